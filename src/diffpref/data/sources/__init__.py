"""Published datasets: one file each, found by its name, in which a hyphen is spelt `_`.

A source module has two functions and a constant. `path` is a local file or folder, `split` chooses where it holds
several.
- `KIND`: "pairs" or "images", what its rows become; None where its function `shape(path, split) -> Shape` tells.
- `count(path, split) -> int`: how many rows `read` will give; it refuses at once what cannot be read (UserError).
- `read(path, split) -> Iterator[Found | Dropped]`: every row in order, images not yet decoded.

A source of tables (`tables.py`) has the constant `COLUMNS` too, and its functions take the columns that the user
renames as a third argument.
"""
