"""WebDataset tars in the normal form, as `data export webdataset` writes them: pairs or single images.

A sample is `KEY.chosen.png`, `KEY.rejected.png` and `KEY.json` with the other columns, or `KEY.png` and `KEY.json`; the
prompt may also stand in `KEY.txt`. Tars in Pick-a-Pic's columns are read by `pickapic`.
"""

from collections.abc import Iterator
from pathlib import Path

from diffpref.data import normal, tables
from diffpref.data.schema import Dropped, Found, Shape
from diffpref.errors import UserError

KIND = None
SHARDS = (".tar",)
COLUMNS = normal.EVERY


def shape(path: Path, split: str, names: tables.Names | None = None) -> Shape:
    """Pairs or single images, and their scores. Raises UserError where the files are no tars of either."""
    files = tables.files(path, split)
    if not tables.is_tar(files[0]):
        raise UserError(f"{files[0]} is no tar file (.tar, .tar.gz or .tgz)")
    if "jpg_0" in (tables.columns(files[0]) or {}):
        raise UserError(f"{files[0]} has Pick-a-Pic's columns: `diffpref data import pickapic` reads it")
    return normal.shape(path, split, names)


def count(path: Path, split: str, names: tables.Names | None = None) -> int:
    """The number of samples and refused members. Raises UserError where a file is broken or lacks a column."""
    return normal.count(path, split, shape(path, split, names), names)


def read(path: Path, split: str, names: tables.Names | None = None) -> Iterator[Found | Dropped]:
    """Every sample, or the reason why it or a member is left out. Raises UserError as `count`."""
    return normal.read(path, split, shape(path, split, names), "webdataset", names)
