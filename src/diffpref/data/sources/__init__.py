"""Published datasets: one file each, found by its name.

A source module has two functions. `path` is a local file or folder, `split` chooses where it holds several.
- `count(path, split) -> int`: how many rows `read` will give; it refuses at once what cannot be read (UserError).
- `read(path, split) -> Iterator[Found | Dropped]`: every row in order, images not yet decoded.
"""
