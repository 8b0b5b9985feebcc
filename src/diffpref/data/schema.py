"""The normal form of pairs: its columns, its records, and the file `dataset.json` beside the shards."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from diffpref import __version__
from diffpref.errors import UserError

DATASET_FILE = "dataset.json"
FORMAT = "diffpref-pairs-1"
REQUIRED = ("prompt", "chosen", "rejected")  # TRL's form; every other column may be absent or null
NAMED_ROWS = 1000  # bad rows that dataset.json names; the rest is counted only

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_COLUMNS = {
    "id": pa.string(),
    "prompt": pa.string(),
    "chosen": _IMAGE,
    "rejected": _IMAGE,
    "chosen_prompt": pa.string(),
    "rejected_prompt": pa.string(),
    "label": pa.float64(),
    "weight": pa.float64(),
    "margin": pa.float64(),
    "chosen_id": pa.string(),
    "rejected_id": pa.string(),
    "chosen_model": pa.string(),
    "rejected_model": pa.string(),
    "source": pa.string(),
    "group_id": pa.string(),
    "annotator_id": pa.string(),
}


def _features(kind: pa.DataType) -> dict[str, str]:
    if kind == _IMAGE:
        return {"_type": "Image"}
    return {"dtype": "float64" if kind == pa.float64() else "string", "_type": "Value"}


_METADATA = {"info": {"features": {name: _features(kind) for name, kind in _COLUMNS.items()}}}
# the "huggingface" entry is what makes `datasets.load_dataset` give images instead of structs
SCHEMA = pa.schema(list(_COLUMNS.items()), metadata={"huggingface": json.dumps(_METADATA)})


@dataclass(frozen=True)
class PairRow:
    """One comparison. `label` is the probability that `chosen` is better, 0.5 a tie; images are the original bytes."""

    id: str
    prompt: str
    chosen: bytes
    rejected: bytes
    chosen_prompt: str | None = None
    rejected_prompt: str | None = None
    label: float = 1.0
    weight: float | None = None
    margin: float | None = None
    chosen_id: str | None = None
    rejected_id: str | None = None
    chosen_model: str | None = None
    rejected_model: str | None = None
    source: str | None = None
    group_id: str | None = None
    annotator_id: str | None = None

    def as_record(self) -> dict:
        """The row as a dict of `SCHEMA`'s columns."""
        images = {side: {"bytes": getattr(self, side), "path": None} for side in ("chosen", "rejected")}
        return {name: getattr(self, name) for name in _COLUMNS} | images


@dataclass(frozen=True)
class Found:
    """A row of a source that can be read, and where it stands; rows count from 0 within their file."""

    file: str
    row: int
    pair: PairRow


@dataclass(frozen=True)
class Dropped:
    """A row of a source that is left out, and why. `bad` tells a broken row from one left out on purpose."""

    file: str
    row: int
    reason: str
    detail: str = ""
    bad: bool = True

    def __str__(self) -> str:
        return f"{self.file} row {self.row}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class DatasetSummary:
    """What an import kept and dropped: the content of `dataset.json`.

    `ties` counts the source's readable ties, whatever became of them; `bad_rows` names the first bad ones.
    """

    source: str
    input: str
    split: str
    options: dict[str, str | float]
    read: int
    kept: int
    ties: int
    dropped: dict[str, int]
    bad_rows: list[Dropped]
    format: str = FORMAT
    diffpref_version: str = __version__

    def write(self, folder: Path) -> None:
        """Write `dataset.json` into the folder."""
        (folder / DATASET_FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_dataset_file(folder: Path) -> dict | None:
    """The content of a folder's `dataset.json`, or None where there is none.

    Raises UserError where it is not one of ours.
    """
    file = folder / DATASET_FILE
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file} does not describe a dataset of diffpref (its format is not {FORMAT!r})")
    return content
