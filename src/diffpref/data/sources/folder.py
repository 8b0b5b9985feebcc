"""A folder of one's own: images, and `metadata.jsonl` or `metadata.csv` with a line for each pair or image.

Pairs have `chosen_file_name`, `rejected_file_name` and `prompt`; single images `file_name` and `prompt`. Further
columns are those of the normal form. `data export folder` writes such a folder, `diffpref generate` one of single
images, and `datasets.load_dataset` opens both.
"""

from collections.abc import Iterator
from pathlib import Path

from diffpref.data import normal, tables
from diffpref.data.schema import Dropped, Found, Shape
from diffpref.errors import UserError

KIND = None
COLUMNS = normal.EVERY
LISTS = ("metadata.jsonl", "metadata.csv")
PAIRS = {"chosen": "chosen_file_name", "rejected": "rejected_file_name"}
IMAGES = {"image": "file_name"}


def shape(path: Path, split: str, names: tables.Names | None = None) -> Shape:
    """Pairs or single images, and their scores. Raises UserError where the list is missing or of neither."""
    file = metadata(path)
    return normal.shape(file, split, _named(file, names))


def count(path: Path, split: str, names: tables.Names | None = None) -> int:
    """The number of rows. Raises UserError where there is no list, or it lacks a column."""
    file = metadata(path)
    return normal.count(file, split, shape(path, split, names), _named(file, names))


def read(path: Path, split: str, names: tables.Names | None = None) -> Iterator[Found | Dropped]:
    """Every row with its images, or the reason why it has none. Raises UserError as `count`."""
    file = metadata(path)
    return normal.read(file, split, shape(path, split, names), "folder", _named(file, names))


def metadata(path: Path) -> Path:
    """The one list of a folder, or `path` itself where it is a file. Raises UserError where there is none or two."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    found = [path / name for name in LISTS if (path / name).is_file()]
    if not found:
        raise UserError(f"{path} holds no {' and no '.join(LISTS)}")
    if len(found) > 1:
        raise UserError(f"{path} holds {' and '.join(LISTS)}: remove one of them")
    return found[0]


def _named(file: Path, names: tables.Names | None) -> tables.Names:
    """The columns of file names in place of images; what the user names comes before."""
    found = tables.columns(file) or {}
    single = IMAGES["image"] in found and not set(PAIRS.values()) & set(found)
    return (IMAGES if single or "image" in (names or {}) else PAIRS) | dict(names or {})
