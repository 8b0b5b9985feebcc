"""Published datasets: one file each, found by its name, in which a hyphen is spelt `_`.

A source module has two functions and a constant. `path` is a local file or folder, `split` chooses where it holds
several.
- `KIND`: "pairs" or "images", what its rows become, or "groups" of ranked images, which become pairs;
  None where its function `shape(path, split) -> Shape` tells.
- `count(path, split) -> int`: how many rows `read` will give; it refuses at once what cannot be read (UserError).
- `read(path, split) -> Iterator[Found | Dropped]`: every row in order, images not yet decoded; `Group` in place of
  `Found` where KIND is "groups".

Three things more where they can be had:
- `read_from(path, split, start)`: as `read`, but from row `start` on, for an import that was killed. Without it the
  rows before are read again and thrown away.
- `SHARDS`: endings of files each of which `read` takes alone, such as (".parquet",), the preferred one first. Those of
  a dataset on the hub are then fetched one by one; without it the whole is fetched first.
- `SCORES`: the columns of scores that its rows have.

A source of tables (`tables.py`) has the constant `COLUMNS` too, and its functions take the columns that the user
renames as a third argument.
"""
