"""Read pairs in the normal form: the light columns at once, the images as a stream or one by one."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from diffpref.data import parquet
from diffpref.data.schema import DATASET_FILE, REQUIRED, read_dataset_file
from diffpref.errors import UserError, nearest

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
LIGHT = {name: pa.string() for name in ("id", "prompt", "chosen_prompt", "rejected_prompt")}
LIGHT |= {name: pa.float64() for name in ("label", "weight")}
CACHED_GROUPS = 4  # row groups of one side that random access keeps


@dataclass(frozen=True)
class Shard:
    """One file: the dataset's row that it starts with, and the number of rows in each of its row groups."""

    file: Path
    first: int
    groups: tuple[int, ...]
    changed: int  # its time of change, so that a cached row group is never of a former file


@dataclass(frozen=True, eq=False)
class PairDataset:
    """The pairs of one split. Row `i` is the i-th in file order; the light columns have one entry a row."""

    path: Path
    split: str
    ids: list[str]
    prompts: list[str]
    chosen_prompts: list[str]  # the row's own caption of the image, or its prompt where it has none
    rejected_prompts: list[str]
    labels: np.ndarray  # float64 (rows,), the probability that the chosen image is better
    weights: np.ndarray  # float64 (rows,)
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, path: Path, split: str = "train") -> "PairDataset":
        """Open a dataset folder (or one parquet file) and read its light columns.

        TRL's columns `prompt, chosen, rejected` are enough. Raises UserError where the folder, the split or a column
        is missing, a column has the wrong type, a label is no probability, or there are no rows.
        """
        path = Path(path)
        splits = parquet.files_by_split(path)
        described = read_dataset_file(path) if path.is_dir() else None
        if split not in splits:
            raise UserError(f"{path} has no split {split!r}: {nearest(split, splits)}")
        shards, tables, first = [], [], 0
        for file in splits[split]:
            with parquet.opened(file) as opened:
                _check_columns(file, opened.schema_arrow)
                columns = [name for name in LIGHT if name in opened.schema_arrow.names]
                tables.append(_light(file, opened.read(columns, use_threads=False)))
                groups = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            shards.append(Shard(file, first, tuple(groups), file.stat().st_mtime_ns))
            first += sum(groups)
        if not first:
            raise UserError(f"{path} is empty: split {split!r} holds no pairs")
        if described and described.get("split") == split and described.get("kept") != first:
            raise UserError(f"{path} holds {first} pairs, but its {DATASET_FILE} tells {described.get('kept')}")
        light = pa.concat_tables(tables)
        prompts = ["" if prompt is None else prompt for prompt in light["prompt"].to_pylist()]
        return cls(
            path=path,
            split=split,
            ids=_or_else(light["id"].to_pylist(), [str(row) for row in range(first)]),
            prompts=prompts,
            chosen_prompts=_or_else(light["chosen_prompt"].to_pylist(), prompts),
            rejected_prompts=_or_else(light["rejected_prompt"].to_pylist(), prompts),
            labels=light["label"].to_numpy(),
            weights=light["weight"].to_numpy(),
            shards=tuple(shards),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def iter_images(self, indices: Collection[int] | None = None) -> Iterator[tuple[int, Side, bytes]]:
        """(row, side, original bytes) of both images of the given rows (all of them by default), in file order.

        Bytes are b"" where a row has no image. Only row groups with a wanted row are read, a few rows at a time.
        """
        wanted = None if indices is None else frozenset(indices)
        for shard in self.shards:
            first = shard.first
            for group, count in enumerate(shard.groups):
                if wanted is None or not wanted.isdisjoint(range(first, first + count)):
                    yield from _group_images(shard.file, group, first, wanted)
                first += count

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


def split_names(path: Path) -> list[str]:
    """The splits of a dataset folder, sorted. Raises UserError where there is no parquet file."""
    return sorted(parquet.files_by_split(path))


def _group_images(
    file: Path, group: int, first: int, wanted: frozenset[int] | None
) -> Iterator[tuple[int, Side, bytes]]:
    with parquet.opened(file) as opened:
        row = first
        columns = list(SIDES)
        for batch in opened.iter_batches(parquet.ROWS_AT_ONCE, [group], columns, use_threads=False):
            images = [batch.column(side) for side in SIDES]
            for within in range(batch.num_rows):
                if wanted is None or row in wanted:
                    for side, column in zip(SIDES, images, strict=True):
                        yield row, side, parquet.image_bytes(column[within].as_py())
                row += 1


@lru_cache(CACHED_GROUPS)
def _image_column(shard: Shard, group: int, side: Side) -> pa.ChunkedArray:
    with parquet.opened(shard.file) as opened:
        return opened.read_row_group(group, [side], use_threads=False).column(side)


def _check_columns(file: Path, schema: pa.Schema) -> None:
    for name in REQUIRED:
        if name not in schema.names:
            raise UserError(f"{file} has no column {name!r} ({nearest(name, set(schema.names) - set(REQUIRED))})")
    for name in SIDES:
        if not parquet.is_image_type(schema.field(name).type):
            raise UserError(f"{file}: column {name!r} is {schema.field(name).type}, not images with their bytes")


def _light(file: Path, table: pa.Table) -> pa.Table:
    """The light columns with their right types: absent ones are null, absent numbers are 1."""
    columns = {}
    for name, kind in LIGHT.items():
        column = table[name] if name in table.column_names else pa.nulls(table.num_rows, kind)
        try:
            column = column.cast(kind)
        except pa.ArrowException:
            raise UserError(f"{file}: column {name!r} is {column.type}, not {kind}") from None
        columns[name] = column if kind == pa.string() else column.fill_null(1.0)
    _check_numbers(file, "label", columns["label"].to_numpy(), 1.0)
    _check_numbers(file, "weight", columns["weight"].to_numpy(), np.finfo(np.float64).max)
    return pa.table(columns)


def _check_numbers(file: Path, name: str, values: np.ndarray, most: float) -> None:
    bad = ~((values >= 0) & (values <= most))  # so that nan is bad
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(f"{file} row {row}: the {name} is {values[row]:g}, not between 0 and {most:g}")


def _or_else(values: list[str | None], fallback: list[str]) -> list[str]:
    return [other if value is None else value for value, other in zip(values, fallback, strict=True)]
