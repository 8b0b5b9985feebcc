"""The normal form of pairs and of single images: columns, records, and the file `dataset.json` beside the shards."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from diffpref import __version__
from diffpref.errors import UserError

Kind = Literal["pairs", "images"]
Side = Literal["chosen", "rejected", "image"]

DATASET_FILE = "dataset.json"
FORMATS: dict[Kind, str] = {"pairs": "diffpref-pairs-1", "images": "diffpref-images-1"}
SIDES: dict[Kind, tuple[Side, ...]] = {"pairs": ("chosen", "rejected"), "images": ("image",)}
NAMED_ROWS = 1000  # bad rows that dataset.json names; the rest is counted only

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TEXT, _NUMBER = pa.string(), pa.float64()
COLUMNS: dict[Kind, dict[str, pa.DataType]] = {
    "pairs": {
        "id": _TEXT,
        "prompt": _TEXT,
        "chosen": IMAGE,
        "rejected": IMAGE,
        "chosen_prompt": _TEXT,
        "rejected_prompt": _TEXT,
        "label": _NUMBER,
        "weight": _NUMBER,
        "margin": _NUMBER,
        "chosen_id": _TEXT,
        "rejected_id": _TEXT,
        "chosen_model": _TEXT,
        "rejected_model": _TEXT,
        "source": _TEXT,
        "group_id": _TEXT,
        "annotator_id": _TEXT,
    },
    "images": {
        "id": _TEXT,
        "prompt": _TEXT,
        "image": IMAGE,
        "image_prompt": _TEXT,
        "label": _NUMBER,
        "weight": _NUMBER,
        "image_id": _TEXT,
        "image_model": _TEXT,
        "source": _TEXT,
        "group_id": _TEXT,
        "annotator_id": _TEXT,
    },
}


def required(kind: Kind) -> tuple[str, ...]:
    """The columns without which a file is not of this kind; every other one may be absent or null."""
    return ("prompt", *SIDES[kind])


def score_column(side: Side, scorer: str) -> str:
    """The column of a scorer's scores of one side; a scorer's name may be spelt with hyphens."""
    name = scorer.replace("-", "_")
    return f"score_{name}" if side == "image" else f"{side}_score_{name}"


def is_score(kind: Kind, column: str) -> bool:
    """Whether a column of this name holds scores."""
    return any(column.startswith(score_column(side, "")) for side in SIDES[kind])


def schema(kind: Kind, scores: Sequence[str] = (), only: Sequence[str] | None = None) -> pa.Schema:
    """The columns that we write, with columns of scores at the end; with `only` these alone, in that order."""
    columns = COLUMNS[kind] | dict.fromkeys(scores, _NUMBER)
    columns = columns if only is None else {name: columns[name] for name in only}
    features = {"info": {"features": {name: _feature(each) for name, each in columns.items()}}}
    # the "huggingface" entry is what makes `datasets.load_dataset` give images instead of structs
    return pa.schema(list(columns.items()), metadata={"huggingface": json.dumps(features)})


def _feature(kind: pa.DataType) -> dict[str, str]:
    if kind == IMAGE:
        return {"_type": "Image"}
    return {"dtype": "float64" if kind == _NUMBER else "string", "_type": "Value"}


@dataclass(frozen=True)
class PairRow:
    """One comparison. `label` is the probability that `chosen` is better, 0.5 a tie; images are the original bytes.

    scores: by column, such as `chosen_score_hps`.
    """

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
    scores: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageRow:
    """One image. `label` is the probability that people like it, None where nobody was asked; scores by column."""

    id: str
    prompt: str
    image: bytes
    image_prompt: str | None = None
    label: float | None = None
    weight: float | None = None
    image_id: str | None = None
    image_model: str | None = None
    source: str | None = None
    group_id: str | None = None
    annotator_id: str | None = None
    scores: dict[str, float | None] = field(default_factory=dict)


Row = PairRow | ImageRow
ROWS: dict[Kind, type[PairRow] | type[ImageRow]] = {"pairs": PairRow, "images": ImageRow}


def exchanged(pair: PairRow) -> PairRow:
    """The same comparison with its two images in the other order, and all that belongs to them."""
    turned = {name: getattr(pair, other_side(name)) for name in COLUMNS["pairs"] if name != "label"}
    scores = {other_side(name): score for name, score in pair.scores.items()}
    return replace(pair, **turned, label=1 - pair.label, scores=scores)


def other_side(column: str) -> str:
    """The column that says of a pair's other image what this one says; itself where it is of both."""
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if column.startswith(side):
            return other + column.removeprefix(side)
    return column


def as_record(row: Row) -> dict[str, Any]:
    """A row as a dict by column."""
    plain = {each.name: getattr(row, each.name) for each in fields(row) if each.name != "scores"}
    return {name: _cell(value) for name, value in plain.items()} | row.scores


def _cell(value: Any) -> Any:
    return {"bytes": value, "path": None} if isinstance(value, bytes) else value


@dataclass(frozen=True)
class Shape:
    """What the rows of some files are: their kind, their columns of scores, and the columns that nobody reads."""

    kind: Kind
    scores: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A row of a source that can be read, and where it stands; rows count from 0 within their file.

    agreement: the share of those asked who stand behind the label, where the source tells it.
    turned: whether the source names the rejected image first.
    """

    file: str
    row: int
    record: Row
    agreement: float | None = None
    turned: bool = False


@dataclass(frozen=True)
class Group:
    """Images of one prompt with a score each, higher is better: what a source of rankings yields. Pairs are made of it.

    names, models: an entry an image, or none at all. ballots: the scores that each annotator gave, likewise; the
    `scores` are what they came to.
    """

    file: str
    row: int
    id: str
    prompt: str
    images: tuple[bytes, ...]
    scores: tuple[float, ...]
    source: str
    names: tuple[str | None, ...] = ()
    models: tuple[str | None, ...] = ()
    ballots: tuple[tuple[float, ...], ...] = ()


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
    """How a dataset was made, what was kept and what dropped: the content of `dataset.json`.

    `ties` counts the source's readable ties, whatever became of them; `bad_rows` names the first bad ones. Of a dataset
    made from another one, `missing` counts the values that could not be had, and `origin` is that one's own summary.
    `outcome` holds what else came out: numbers that are no option of the work.
    `splits` counts the rows of each split where the import made several.
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
    missing: dict[str, int] = field(default_factory=dict)
    origin: dict[str, Any] | None = None
    splits: dict[str, int] = field(default_factory=dict)
    outcome: dict[str, float] = field(default_factory=dict)
    format: str = FORMATS["pairs"]
    diffpref_version: str = __version__

    def write(self, folder: Path) -> None:
        """Write `dataset.json` into the folder."""
        (folder / DATASET_FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_dataset_file(folder: Path) -> dict[str, Any] | None:
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
    known = list(FORMATS.values())
    if not isinstance(content, dict) or content.get("format") not in known:
        raise UserError(f"{file} does not describe a dataset of diffpref (its format is none of {', '.join(known)})")
    return content


def rows_told(described: dict[str, Any] | None, split: str) -> int | None:
    """The number of rows that the content of a `dataset.json` tells of a split, None where it tells none."""
    if not described:
        return None
    if described.get("splits"):
        return described["splits"].get(split)
    return described.get("kept") if described.get("split") == split else None
