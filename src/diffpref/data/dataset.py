"""Read the normal form: the light columns at once, the images as a stream or one by one."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diffpref.data import parquet
from diffpref.data.columns import kind_of, numbers, read_light, texts_of, type_of
from diffpref.data.schema import DATASET_FILE, ROWS, SIDES, Kind, Row, Side, is_score, read_dataset_file, rows_told
from diffpref.errors import UserError, nearest
from diffpref.files import stamp

CACHED_GROUPS = 4  # row groups of one side that random access keeps


@dataclass(frozen=True)
class Shard:
    """One file: the dataset's row that it starts with, and the number of rows in each of its row groups."""

    file: Path
    first: int
    groups: tuple[int, ...]
    changed: int  # its time of change, so that a cached row group is never of a former file


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file: its number there, and the dataset's rows in it."""

    shard: Shard
    number: int
    rows: range


@dataclass(frozen=True)
class Pictures:
    """The images of a split, without all else: what another process needs to read them."""

    shards: tuple[Shard, ...]
    sides: tuple[Side, ...]

    def __len__(self) -> int:
        """The number of rows."""
        return sum(sum(shard.groups) for shard in self.shards)

    def parts(self) -> Iterator[tuple[str, Pictures]]:
        """The images of each file, under a name that changes whenever the file is written."""
        for shard in self.shards:
            yield stamp([shard.file]), Pictures((shard,), self.sides)

    def where(self, row: int, side: str) -> str:
        """An image's place in words."""
        return f"row {row}" if len(self.sides) == 1 else f"row {row} ({side})"

    def row_groups(self) -> Iterator[RowGroup]:
        """What the files are read by, in file order."""
        for shard in self.shards:
            first = shard.first
            for number, count in enumerate(shard.groups):
                yield RowGroup(shard, number, range(first, first + count))
                first += count

    def iter_images(self, indices: Collection[int] | None = None) -> Iterator[tuple[int, Side, bytes]]:
        """As `PreferenceDataset.iter_images`."""
        wanted = None if indices is None else frozenset(indices)
        least, most = (0, sys.maxsize) if not wanted else (min(wanted), max(wanted))
        for group in self.row_groups():
            near = group.rows.start <= most and group.rows.stop > least
            if wanted is None or (near and not wanted.isdisjoint(group.rows)):
                yield from self.group_images(group, wanted)

    def group_images(self, group: RowGroup, wanted: Collection[int] | None = None) -> Iterator[tuple[int, Side, bytes]]:
        """As `iter_images`, of one row group."""
        return _group_images(group.shard.file, group.number, self.sides, group.rows.start, wanted)


@dataclass(frozen=True, eq=False)
class PreferenceDataset:
    """The pairs or single images of one split. Row `i` is the i-th in file order; light columns have an entry a row.

    labels: float64 (rows,), of a pair the probability that the chosen image is better, of a single image that people
    like it, NaN where nobody was asked. weights: float64 (rows,).
    texts: captions, generators and names of images (`chosen_prompt, chosen_model, chosen_id`, ...), as far as the files
    have the columns.
    numbers: `margin` and all columns of scores, likewise; float64 (rows,), NaN where a row has none.
    left_out: rows that the configuration's options leave out, and why.
    """

    path: Path
    split: str
    kind: Kind
    ids: list[str]
    prompts: list[str]
    labels: np.ndarray
    weights: np.ndarray
    shards: tuple[Shard, ...]
    texts: dict[str, list[str | None]] = field(default_factory=dict)
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, split: str = "train") -> PreferenceDataset:
        """Open a dataset folder (or one parquet file) and read its light columns.

        TRL's columns `prompt, chosen, rejected` are enough, or `prompt, image` for single images. Raises UserError
        where the folder, the split or a column is missing, a column has the wrong type, a label is no probability, or
        there are no rows.
        """
        path = Path(path)
        splits = parquet.files_by_split(path)
        described = read_dataset_file(path) if path.is_dir() else None
        if split not in splits:
            raise UserError(f"{path} has no split {split!r}: {nearest(split, splits)}")
        shards, tables, first = [], [], 0
        kinds: dict[Kind, Path] = {}
        for file in splits[split]:
            with parquet.opened(file) as opened:
                kind = kind_of(file, opened.schema_arrow)
                kinds.setdefault(kind, file)
                tables.append(read_light(file, kind, opened))
                groups = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            shards.append(Shard(file, first, tuple(groups), file.stat().st_mtime_ns))
            first += sum(groups)
        kind, *others = kinds
        if others:
            raise UserError(f"{kinds[kind]} holds {kind}, but {kinds[others[0]]} of the same split {others[0]}")
        if not first:
            raise UserError(f"{path} is empty: split {split!r} holds no {kind}")
        if (told := rows_told(described, split)) not in (None, first):
            raise UserError(f"{path} holds {first} {kind}, but its {DATASET_FILE} tells {told}")
        light = pa.concat_tables(tables, promote_options="default")
        texts = {name: texts_of(light[name]) for name in light.column_names if light[name].type == pa.string()}
        values = {name: numbers(light[name]) for name in light.column_names if name not in texts}
        ids, prompts = texts.pop("id", [None] * first), texts.pop("prompt")
        labels, weights = (values.pop(name, np.full(first, np.nan)) for name in ("label", "weight"))
        return cls(
            path=path,
            split=split,
            kind=kind,
            ids=[str(row) if name is None else name for row, name in enumerate(ids)],
            prompts=["" if prompt is None else prompt for prompt in prompts],
            labels=np.where(np.isnan(labels), 1.0, labels) if kind == "pairs" else labels,
            weights=np.where(np.isnan(weights), 1.0, weights),
            shards=tuple(shards),
            texts=texts,
            numbers=values,
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pictures(self) -> Pictures:
        """Where the images stand."""
        return Pictures(self.shards, self.sides)

    @property
    def sides(self) -> tuple[Side, ...]:
        """The columns of images: `chosen` and `rejected`, or `image`."""
        return SIDES[self.kind]

    def caption(self, row: int, side: Side) -> str:
        """The row's own caption of an image, or its prompt where it has none."""
        own = self.texts.get(f"{side}_prompt")
        return self.prompts[row] if own is None or own[row] is None else str(own[row])

    def captions(self) -> dict[str, None]:
        """Every different caption of the rows that are not left out, in their order."""
        rows = (row for row in range(len(self)) if row not in self.left_out)
        return dict.fromkeys(self.caption(row, side) for row in rows for side in self.sides)

    def iter_images(self, indices: Collection[int] | None = None) -> Iterator[tuple[int, Side, bytes]]:
        """(row, side, original bytes) of all images of the given rows (all of them by default), in file order.

        Bytes are b"" where a row has no image. Only row groups with a wanted row are read, a few rows at a time.
        """
        return self.pictures.iter_images(indices)

    def image_bytes(self, row: int, side: Side) -> bytes:
        """The original bytes of one image, b"" where the row has none. Raises IndexError for a row out of range."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = next(shard for shard in reversed(self.shards) if shard.first <= row)
        within = row - shard.first
        for group, count in enumerate(shard.groups):
            if within < count:
                return parquet.image_bytes(_image_column(shard, group, side)[within].as_py())
            within -= count
        raise AssertionError("the shards' row counts do not add up")

    def rows(self) -> Iterator[Row]:
        """Every row with its images and all columns of the normal form, a few in memory at a time."""
        number = 0
        for shard in self.shards:
            with parquet.opened(shard.file) as opened:
                known = [name for name in opened.schema_arrow.names if type_of(self.kind, name) is not None]
            for record in parquet.rows(shard.file, known):
                yield self._row(number, record)
                number += 1

    def score_columns(self) -> list[str]:
        """The names of the columns of scores, in the files' order."""
        return [name for name in self.numbers if is_score(self.kind, name)]

    def strange_columns(self) -> list[str]:
        """The names of columns that the normal form does not know, which `rows` leaves out."""
        found: dict[str, None] = {}
        for shard in self.shards:
            with parquet.opened(shard.file) as opened:
                names = opened.schema_arrow.names
            found |= dict.fromkeys(name for name in names if type_of(self.kind, name) is None)
        return list(found)

    def _row(self, number: int, record: dict[str, Any]) -> Row:
        given: dict[str, Any] = {"id": self.ids[number], "prompt": ""} | dict.fromkeys(self.sides, b"")
        scores: dict[str, float | None] = dict.fromkeys(self.score_columns())
        for name, value in record.items():
            if is_score(self.kind, name):
                scores[name] = None if value is None else float(value)
            elif name in self.sides:
                given[name] = parquet.image_bytes(value)
            elif value is not None:
                given[name] = str(value) if type_of(self.kind, name) == pa.string() else float(value)
        return ROWS[self.kind](**given, scores=scores)


def split_names(path: Path) -> list[str]:
    """The splits of a dataset folder, sorted. Raises UserError where there is no parquet file."""
    return sorted(parquet.files_by_split(path))


def _group_images(
    file: Path, group: int, sides: tuple[Side, ...], first: int, wanted: Collection[int] | None
) -> Iterator[tuple[int, Side, bytes]]:
    with parquet.opened(file) as opened:
        row = first
        for batch in opened.iter_batches(parquet.ROWS_AT_ONCE, [group], list(sides), use_threads=False):
            images = [batch.column(side) for side in sides]
            for within in range(batch.num_rows):
                if wanted is None or row in wanted:
                    for side, column in zip(sides, images, strict=True):
                        yield row, side, parquet.image_bytes(column[within].as_py())
                row += 1


@lru_cache(CACHED_GROUPS)
def _image_column(shard: Shard, group: int, side: Side) -> pa.ChunkedArray:
    with parquet.opened(shard.file) as opened:
        return opened.read_row_group(group, [side], use_threads=False).column(side)
