"""Import a published dataset: read a source, keep the rows whose images decode, write the normal form."""

import hashlib
import importlib
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

from diffpref.data import images, sources
from diffpref.data.naming import settled
from diffpref.data.schema import (
    FORMATS,
    NAMED_ROWS,
    SIDES,
    DatasetSummary,
    Dropped,
    Found,
    Kind,
    PairRow,
    Row,
    exchanged,
)
from diffpref.data.threads import map_in_order
from diffpref.data.writing import ShardWriter, new_folder
from diffpref.errors import UserError, nearest
from diffpref.progress import Bar

Ties = Literal["keep", "drop", "random"]


@runtime_checkable
class Source(Protocol):
    """What a module in `data/sources` offers, once its KIND is settled."""

    KIND: Kind

    def count(self, path: Path, split: str) -> int: ...
    def read(self, path: Path, split: str) -> Iterator[Found | Dropped]: ...


@dataclass(frozen=True)
class ImportOptions:
    """How to import: the split, what becomes of ties, and the share of bad rows above which to stop.

    columns: the input's columns for columns that the source asks for, where they have another name.
    """

    split: str = "train"
    ties: Ties = "keep"
    max_bad_share: float = 0.05
    overwrite: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)


def import_source(source: str, input: Path, output: Path, options: ImportOptions | None = None) -> DatasetSummary:
    """Write the pairs or single images of a published dataset at `input` to the folder `output` in the normal form.

    Raises UserError, and leaves nothing at `output`, where the source, the input or the output will not do, where more
    than `max_bad_share` of the judged rows are bad, or where no row is left.
    """
    options = options or ImportOptions()
    _check_options(options)
    module = find_source(source)
    if input.resolve().is_relative_to(output.resolve()):
        raise UserError(f"the output {output} would replace the input {input}: choose another folder")
    with new_folder(output, options.overwrite) as folder:
        reader = cast(Source, settled(source, module, input, options.split, options.columns))
        total = reader.count(input, options.split)
        if not total:
            raise UserError(f"{input} is empty: it holds no rows")
        tally = Tally(total, options.max_bad_share)
        rows = map_in_order(_with_images_checked, reader.read(input, options.split))
        if left_out := getattr(reader, "LEFT_OUT", ()):
            print(f"diffpref: warning: columns that are left out: {', '.join(left_out)}", file=sys.stderr)
        kind = reader.KIND
        shards = ShardWriter(folder, options.split, kind=kind, scores=getattr(reader, "SCORES", ()))
        with shards, Bar(f"import {source}", total, kind) as bar:
            for row in rows:
                if record := tally.count(row, options.ties):
                    shards.write(record)
                bar.advance()
        tally.finish(input, kind)
        summary = DatasetSummary(
            source=source,
            input=str(input),
            split=options.split,
            options={"ties": options.ties, "max_bad_share": options.max_bad_share} | _told(options.columns),
            read=tally.read,
            kept=tally.kept,
            ties=tally.ties,
            dropped=dict(tally.dropped.most_common()),
            bad_rows=tally.named,
            format=FORMATS[kind],
        )
        summary.write(folder)
    if options.ties == "keep" and summary.ties == summary.kept:
        every = f"every {kind.removesuffix('s')} in {output}"
        print(f"diffpref: warning: {every} is a tie; there is no preference to train on", file=sys.stderr)
    return summary


def find_source(name: str) -> Any:
    """The source module of that name. Raises UserError with the nearest name where there is none."""
    known = [module.name.replace("_", "-") for module in pkgutil.iter_modules(sources.__path__)]
    if name not in known:
        raise UserError(f"unknown source {name!r}: {nearest(name, known)}")
    return importlib.import_module(f"diffpref.data.sources.{name.replace('-', '_')}")


@dataclass
class Tally:
    """Counts the rows of an import by what becomes of them, and stops it when too many are bad."""

    total: int
    max_bad_share: float
    read: int = 0
    judged: int = 0  # read, without the rows that the source left out on purpose
    kept: int = 0
    ties: int = 0
    bad: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    named: list[Dropped] = field(default_factory=list)
    bad_reasons: Counter[str] = field(default_factory=Counter)

    def count(self, row: Found | Dropped, ties: Ties) -> Row | None:
        """Count the row; the record to write, or None where it is dropped. Raises UserError as soon as it must."""
        self.read += 1
        self.judged += isinstance(row, Found) or row.bad
        if isinstance(row, Found) and row.record.label == 0.5:
            self.ties += 1
            if ties == "drop":
                row = Dropped(row.file, row.row, "tie", bad=False)
            elif ties == "random":
                row = replace(row, record=broken_tie(row.record))
        if isinstance(row, Found):
            self.kept += 1
            return row.record
        self._drop(row)
        return None

    def finish(self, input: Path, kind: Kind) -> None:
        """Judge the whole. Raises UserError where too many judged rows are bad or no row is left."""
        self._stop_if_too_many(self.judged)
        if not self.kept:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
            row = kind.removesuffix("s")
            raise UserError(f"no {row} of {input} is left; of {self.read} rows were dropped: {reasons}")

    def _drop(self, row: Dropped) -> None:
        self.dropped[row.reason] += 1
        if row.bad:
            self.bad += 1
            self.bad_reasons[row.reason] += 1
            if len(self.named) < NAMED_ROWS:
                self.named.append(row)
            self._stop_if_too_many(self.total)  # even if all that follow are good

    def _stop_if_too_many(self, rows: int) -> None:
        if not self.bad or self.bad / rows <= self.max_bad_share:
            return
        (reason, count), *_ = self.bad_reasons.most_common(1)
        raise UserError(
            f"more than {self.max_bad_share:.3g} of {rows} rows are bad: {self.bad} after reading {self.read}, "
            f"most often {reason} ({count}); the first: {self.named[0]}"
        )


def broken_tie(row: Row) -> Row:
    """The tie decided by a coin that its id fixes: a pair's images stand or change places, an image is liked or not."""
    if hashlib.sha256(row.id.encode()).digest()[0] % 2 == 0:
        return replace(row, label=1.0)
    return replace(exchanged(row), label=1.0) if isinstance(row, PairRow) else replace(row, label=0.0)


def _with_images_checked(row: Found | Dropped) -> Found | Dropped:
    if isinstance(row, Dropped):
        return row
    pair = isinstance(row.record, PairRow)
    for side in SIDES["pairs" if pair else "images"]:
        try:
            images.decode(getattr(row.record, side))
        except images.BadImage as error:
            which = f"the {side} image: " if pair else ""
            return Dropped(row.file, row.row, f"image_{error.reason}", f"{which}{error}")
    return row


def _told(columns: Mapping[str, str]) -> dict[str, str]:
    """The named columns as `dataset.json` tells them."""
    return {"columns": " ".join(f"{name}={column}" for name, column in columns.items())} if columns else {}


def _check_options(options: ImportOptions) -> None:
    if not re.fullmatch(r"\w+", options.split):
        raise UserError(f"{options.split!r} is no name for a split: letters, digits and underscores only")
    if not 0 <= options.max_bad_share <= 1:
        raise UserError(f"the share of bad rows must lie between 0 and 1, not {options.max_bad_share:g}")
