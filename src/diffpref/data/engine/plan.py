"""A plan: the different questions of a dataset, in order, cut into units."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("text", pa.string()),
        ("name", pa.string()),
        ("image", pa.binary()),
        ("row", pa.int64()),
        ("side", pa.string()),
    ]
)


@dataclass(frozen=True)
class Question:
    """What a tool is asked. `image` is the SHA-256 of the image's file, b"" where it is of a text alone.

    name: what else the answer depends on, such as a row's id as a seed. row, side: where the image is found; they are
    no part of the question.
    """

    text: str
    image: bytes = b""
    name: str = ""
    row: int = -1
    side: str = ""

    @property
    def key(self) -> bytes:
        """16 bytes that name the question."""
        parts = (self.text.encode("utf-8", "surrogatepass"), self.name.encode("utf-8", "surrogatepass"), self.image)
        whole = hashlib.sha256()
        for part in parts:
            whole.update(len(part).to_bytes(8, "big") + part)
        return whole.digest()[:16]


@dataclass(frozen=True)
class Plan:
    """Different questions, in the order of their first appearance; a unit is a run of `unit` of them."""

    table: pa.Table
    unit: int

    def __len__(self) -> int:
        """The number of questions."""
        return self.table.num_rows

    def units(self) -> Iterator[tuple[str, pa.Table]]:
        """Each unit by its name: a hash of its questions."""
        for start in range(0, len(self), self.unit):
            unit = self.table.slice(start, self.unit)
            yield name_of(unit), unit


def plan_of(questions: Iterable[Question], unit: int) -> tuple[Plan, np.ndarray]:
    """The plan of these questions, and of each of them its number within the plan: int64 (questions,)."""
    numbers: list[int] = []
    places: dict[bytes, int] = {}
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    for question in questions:
        key = question.key
        if key not in places:
            places[key] = len(places)
            columns["key"].append(key)
            for name in SCHEMA.names[1:]:
                columns[name].append(getattr(question, name))
        numbers.append(places[key])
    return Plan(pa.table(columns, SCHEMA), unit), np.array(numbers, np.int64)


def name_of(unit: pa.Table) -> str:
    """The unit's name: a hash of its questions' keys."""
    return hashlib.sha256(b"".join(unit["key"].to_pylist())).hexdigest()[:24]
