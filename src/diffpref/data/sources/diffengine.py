"""diffengine's preference folders: `metadata.csv` with `image`, `image2`, `text` and `label_0`, image files beside.

`label_0` is 1 where `image` was preferred, 0 where `image2` was, 0.5 for a tie (`image` then stands as chosen).
"""

from collections.abc import Iterator
from pathlib import Path

from diffpref.data import tables
from diffpref.data.fields import Columns, Record, text, winner
from diffpref.data.schema import Dropped, Found, Kind, PairRow
from diffpref.errors import UserError

KIND: Kind = "pairs"
COLUMNS = Columns({"image": "image", "image2": "image", "text": "text", "label_0": "number"})
LIST = "metadata.csv"


def count(path: Path, split: str, names: tables.Names | None = None) -> int:
    """The number of rows. Raises UserError where there is no list, or it lacks a column."""
    return tables.count(_list(path), split, COLUMNS, names)


def read(path: Path, split: str, names: tables.Names | None = None) -> Iterator[Found | Dropped]:
    """Every row as a pair or with the reason why it is none. Raises UserError as `count`."""
    return tables.read(_list(path), split, COLUMNS, _pair, names)


def _pair(record: Record, name: str) -> PairRow:
    prompt, label = text(record, "text"), winner(record, "label_0")
    chosen, rejected = ("image2", "image") if label == 0 else ("image", "image2")
    return PairRow(
        id=name,
        prompt=prompt,
        chosen=record[chosen] or b"",
        rejected=record[rejected] or b"",
        label=max(label, 1 - label),
        source="diffengine",
    )


def _list(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    if not (path / LIST).is_file():
        raise UserError(f"{path} holds no {LIST}")
    return path / LIST
