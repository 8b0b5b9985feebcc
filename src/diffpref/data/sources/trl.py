"""Preference sets as TRL has them: `prompt`, `chosen` and `rejected`, the images as structs or raw bytes.

Open-Image-Preferences (binarized) is one. Further columns of the normal form are taken where there are any.
"""

from collections.abc import Iterator
from pathlib import Path

from diffpref.data import normal
from diffpref.data.schema import Dropped, Found, Shape
from diffpref.data.tables import Names
from diffpref.errors import UserError

KIND = None
SHARDS = (".parquet", ".tar")
COLUMNS = normal.wanted(Shape("pairs"))


def shape(path: Path, split: str, names: Names | None = None) -> Shape:
    """Pairs, and their scores. Raises UserError where there are none."""
    found = normal.shape(path, split, names)
    if found.kind != "pairs":
        raise UserError(f"{path} holds single images, no pairs (a column 'chosen')")
    return found


def count(path: Path, split: str, names: Names | None = None) -> int:
    """The number of rows. Raises UserError where a file is broken or lacks a column."""
    return normal.count(path, split, shape(path, split, names), names)


def read(path: Path, split: str, names: Names | None = None) -> Iterator[Found | Dropped]:
    """Every row as a pair or with the reason why it is none. Raises UserError as `count`."""
    return normal.read(path, split, shape(path, split, names), "trl", names)
