"""Parquet files of a dataset: find them by split, open them, stream their rows; every fault is a UserError."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.errors import UserError

ROWS_AT_ONCE = 32
SHARD_NAME = re.compile(r"(\w+?)-\d{5}(-of-\d{5}.*)?")  # ours: train-00000; the hub's: train-00000-of-00012-abc
SPLIT_NAME = re.compile(r"(train|validation|valid|val|test|dev|eval)\w*")


def files_by_split(path: Path) -> dict[str, list[Path]]:
    """The parquet files at `path` (a file or a folder, hidden ones left out), sorted, by the split that they name.

    Files whose names tell no split belong to "train". Raises UserError where there is no path or no parquet file.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_file():
        return {split_of(path): [path]}
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            splits.setdefault(split_of(file), []).append(file)
    if not splits:
        raise UserError(f"{path} holds no parquet files")
    return splits


def split_of(file: Path) -> str:
    """The split that a file's name tells: `test` for `test-00001.parquet` and `test.parquet`; else `train`."""
    if shard := SHARD_NAME.fullmatch(file.stem):
        return shard[1]
    return file.stem if SPLIT_NAME.fullmatch(file.stem) else "train"


def files_of_split(path: Path, split: str) -> list[Path]:
    """The files to import: all of them where `path` holds one split, whatever its name, else those of `split`."""
    splits = files_by_split(path)
    if len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        raise UserError(f"{path} holds the splits {', '.join(sorted(splits))}: choose one of them with --split")
    return splits[split]


@contextmanager
def opened(file: Path) -> Iterator[pq.ParquetFile]:
    """The open file. Raises UserError where it cannot be read, at opening or later within the block."""
    try:
        with pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as parquet:
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the latter of text that is not UTF-8
        raise UserError(f"{file} is not a readable parquet file: {' '.join(str(error).split())}") from error


def rows(file: Path, columns: list[str], start: int = 0) -> Iterator[dict]:
    """The rows of a file from row `start` on, as dicts of the given columns, a few in memory at a time.

    Row groups before `start` are not read. Raises UserError as `opened`.
    """
    with opened(file) as parquet:
        first = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if start < first + count:
                yield from _group_rows(parquet, group, columns, max(start - first, 0))
            first += count


def _group_rows(parquet: pq.ParquetFile, group: int, columns: list[str], skipped: int) -> Iterator[dict]:
    for batch in parquet.iter_batches(ROWS_AT_ONCE, [group], columns, use_threads=False):
        if skipped < batch.num_rows:
            yield from batch.slice(skipped).to_pylist()
        skipped = max(skipped - batch.num_rows, 0)


def image_bytes(cell: dict | bytes | None) -> bytes:
    """The bytes in an image cell, a plain binary or an Image struct; b"" where it has none."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data or b""


def is_image_type(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold image bytes: binary, or an Image struct with `bytes`."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
