"""Write a dataset that is made from another one: count what becomes of its rows, and tell where it comes from."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from diffpref.data.choice import MAX_BAD_SHARE
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.engine import Answer, Answers
from diffpref.data.schema import FORMATS, NAMED_ROWS, DatasetSummary, Dropped, Kind, Row, read_dataset_file
from diffpref.data.standing import made_before
from diffpref.data.writing import ShardWriter, clear_leftovers, new_folder
from diffpref.errors import UserError
from diffpref.progress import track


@runtime_checkable
class RowWriter(Protocol):
    """What takes the rows of a new dataset: the shards of the normal form, or an export."""

    def __enter__(self) -> RowWriter: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...
    def write(self, row: Row) -> None: ...


@dataclass
class Making:
    """A dataset on its way to the disk. `source` names how it is made, `options` what with."""

    dataset: PreferenceDataset
    source: str
    options: dict[str, str | float]
    kind: Kind
    shards: RowWriter
    read: int = 0
    kept: int = 0
    ties: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    outcome: dict[str, float] = field(default_factory=dict)
    bad: int = 0
    named: list[Dropped] = field(default_factory=list)

    def keep(self, row: Row) -> None:
        """Write a row."""
        self.read += 1
        self.kept += 1
        self.ties += row.label == 0.5
        self.shards.write(row)

    def drop(self, number: int, reason: str) -> None:
        """Leave out row `number` of the old dataset on purpose."""
        self.read += 1
        self.dropped[reason] += 1

    def drop_bad(self, number: int, reason: str, detail: str) -> None:
        """Leave out the broken row `number`. Raises UserError where more than 5% of all rows are such."""
        self.drop(number, reason)
        self.bad += 1
        shard = next(shard for shard in reversed(self.dataset.shards) if shard.first <= number)
        if len(self.named) < NAMED_ROWS:
            self.named.append(Dropped(shard.file.name, number - shard.first, reason, detail))
        if self.bad > MAX_BAD_SHARE * len(self.dataset):
            raise UserError(
                f"over {MAX_BAD_SHARE:.0%} of {len(self.dataset)} rows are bad: {self.bad} after reading {self.read}; "
                f"the first: {self.named[0]}"
            )

    def answered(self, answers: Sequence[Answers]) -> Iterator[tuple[int, Row, list[list[Answer]]]]:
        """Every row whose images can be decoded, by number, with its answers: a list a tool, in it one for each image.

        answers: of each tool what it says of `image_questions`. Rows with broken images are dropped as bad.
        """
        sides = len(self.dataset.sides)
        for number, row in enumerate(track(self.dataset.rows(), self.source, len(self.dataset), "rows")):
            said = [[each[number * sides + side] for side in range(sides)] for each in answers]
            broken = next((answer for answer in said[0] if answer.broken), None)
            if broken is None:
                yield number, row, said
            else:
                self.drop_bad(number, f"image_{broken.broken}", broken.why or "")

    def summary(self) -> DatasetSummary:
        """What `dataset.json` will say."""
        path = self.dataset.path
        return DatasetSummary(
            source=self.source,
            input=str(path),
            split=self.dataset.split,
            options=self.options,
            outcome=self.outcome,
            read=self.read,
            kept=self.kept,
            ties=self.ties,
            dropped={reason: count for reason, count in self.dropped.most_common() if count},
            bad_rows=self.named,
            missing=dict(self.missing),
            origin=_origin(path),
            format=FORMATS[self.kind],
        )


def whole_already(
    dataset: PreferenceDataset, output: Path, source: str, options: dict[str, str | float]
) -> DatasetSummary | None:
    """What `making` with the same arguments has made at `output`, if it has and nothing changed since; it is told."""
    clear_leftovers(output.resolve())
    wanted = {
        "source": source,
        "input": str(dataset.path),
        "split": dataset.split,
        "options": options,
        "origin": _origin(dataset.path),
    }
    return made_before(output, wanted, dataset.path)


def _origin(path: Path) -> dict[str, Any] | None:
    return read_dataset_file(path) if path.is_dir() else None


@contextmanager
def making(
    dataset: PreferenceDataset,
    output: Path,
    source: str,
    options: dict[str, str | float],
    kind: Kind,
    scores: Sequence[str],
    overwrite: bool,
    writer: Callable[[Path], RowWriter] | None = None,
) -> Iterator[Making]:
    """A new dataset to fill; it stands at `output` when the block ends well, and leaves nothing when it does not.

    scores: its columns of scores. writer: what writes it into a folder, where that is not the normal form. Raises
    UserError where `output` is taken or would replace what is read, and where no row is kept.
    """
    if dataset.path.resolve().is_relative_to(output.resolve()):
        raise UserError(f"the output {output} would replace the input {dataset.path}: choose another folder")
    if strange := dataset.strange_columns():
        print(f"diffpref: warning: columns of no normal form are left out: {', '.join(strange)}", file=sys.stderr)
    with new_folder(output, overwrite) as folder:
        made_of = writer(folder) if writer else ShardWriter(folder, dataset.split, kind=kind, scores=scores)
        with made_of as shards:
            made = Making(dataset, source, options, kind, shards)
            yield made
        if not made.kept:
            reasons = ", ".join(f"{count} {reason}" for reason, count in made.dropped.most_common() if count)
            raise UserError(f"no row of {dataset.path} is left: {reasons}")
        made.summary().write(folder)
