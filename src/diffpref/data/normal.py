"""Sources whose files have the columns of the normal form already: rows from records, whatever holds these."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffpref.data import tables
from diffpref.data.fields import Columns, Record, What, number, text
from diffpref.data.schema import COLUMNS, ROWS, SIDES, Dropped, Found, Kind, Row, Shape, is_score, required
from diffpref.errors import UserError, nearest

LIMITS = {"label": (0.0, 1.0), "weight": (0.0, math.inf), "margin": (-math.inf, math.inf)}


def wanted(shape: Shape) -> Columns:
    """The columns to read for rows of that shape."""
    kinds: dict[str, What] = {
        name: "number" if type_ == pa.float64() else "image" if name in SIDES[shape.kind] else "name"
        for name, type_ in COLUMNS[shape.kind].items()
    }
    kinds |= {"prompt": "text", **dict.fromkeys(shape.scores, "number")}
    needed = required(shape.kind)
    return Columns({name: kinds.pop(name) for name in needed}, kinds)


EVERY = Columns({}, {**wanted(Shape("images")).all, **wanted(Shape("pairs")).all})


def shape(path: Path, split: str, names: tables.Names | None = None) -> Shape:
    """Whether the files hold pairs or single images, with which scores.

    Raises UserError where they hold neither or cannot be read.
    """
    names = names or {}
    found: dict[str, None] = {}
    for file in tables.files(path, split):
        found |= dict.fromkeys(tables.columns(file) or {})
    columns = [*names, *(name for name in found if name not in names.values())]
    if not found:
        return Shape("pairs")  # of no rows
    kinds: list[Kind] = [kind for kind, sides in SIDES.items() if set(sides) & set(columns)]
    if not kinds:
        first = names.get("chosen", "chosen")
        raise UserError(f"{path} has neither pairs nor single images: no column {first!r} ({nearest(first, columns)})")
    scores = [name for name in columns if is_score(kinds[0], name)]
    left_out = [name for name in columns if name not in COLUMNS[kinds[0]] and name not in scores]
    return Shape(kinds[0], tuple(scores), tuple(left_out))


def count(path: Path, split: str, shape: Shape, names: tables.Names | None = None) -> int:
    """The number of rows. Raises UserError where a file lacks a column or is broken."""
    return tables.count(path, split, wanted(shape), names)


def read(
    path: Path, split: str, shape: Shape, source: str, names: tables.Names | None = None
) -> Iterator[Found | Dropped]:
    """Every row; those without a column `id` or `source` get a name of their file and `source`."""
    return tables.read(path, split, wanted(shape), partial(_row, shape, source), names)


def _row(shape: Shape, source: str, record: Record, name: str) -> Row:
    given: dict[str, Any] = {"source": source}
    given |= {each: record[each] for each in COLUMNS[shape.kind] if each in record}
    given["id"] = record.get("id") or name
    given["prompt"] = text(record, "prompt")
    given |= {side: record.get(side) or b"" for side in SIDES[shape.kind]}
    given |= {each: number(record, each, *limits) for each, limits in LIMITS.items() if each in given}
    if shape.kind == "pairs" and given.get("label") is None:
        given["label"] = 1.0
    return ROWS[shape.kind](**given, scores={each: number(record, each) for each in shape.scores})
