"""Write a dataset folder: shards in bounded memory, in a folder that appears whole or not at all."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.data.schema import SIDES, Kind, Row, as_record, read_dataset_file, schema
from diffpref.errors import UserError
from diffpref.files import flush

GROUP_ROWS = 64  # a row group is what a random access reads
GROUP_BYTES = 16 * 2**20
SHARD_BYTES = 256 * 2**20
_REPEATED = ("_model", "source", "group_id", "annotator_id")  # ends of columns worth a dictionary


class ShardWriter:
    """Write rows to `<split>-00000.parquet`, `<split>-00001.parquet`, ... Use it as a context manager.

    scores: the columns of scores that the rows may have. only: the columns to write, where not all.
    first: the number of the first shard.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        group_rows: int = GROUP_ROWS,
        shard_bytes: int = SHARD_BYTES,
        kind: Kind = "pairs",
        scores: Sequence[str] = (),
        only: Sequence[str] | None = None,
        first: int = 0,
    ) -> None:
        self._folder, self._split = folder, split
        self._group_rows, self._shard_bytes = group_rows, shard_bytes
        self._kind: Kind = kind
        self._schema = schema(kind, scores, only)
        self._rows: list[Row] = []
        self._buffered = self._written = 0
        self._shards = first
        self._file: pq.ParquetWriter | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        self._close()

    def write(self, row: Row) -> None:
        """Add a row; it reaches the disk with its row group."""
        self._rows.append(row)
        self._buffered += sum(len(getattr(row, side)) for side in SIDES[self._kind])
        if len(self._rows) >= self._group_rows or self._buffered >= GROUP_BYTES:
            self._flush()

    def end_shard(self) -> int:
        """Finish the shard, down to the disk, and give the number of shards so far; the next row begins another."""
        self._flush()
        if self._file is not None:
            self._close()
            flush(self._folder / f"{self._split}-{self._shards - 1:05d}.parquet")
        return self._shards

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._file is None:
            file = self._folder / f"{self._split}-{self._shards:05d}.parquet"
            self._file = _parquet_writer(file, self._schema, SIDES[self._kind])
            self._shards += 1
        table = pa.Table.from_pylist([as_record(row) for row in self._rows], self._schema)
        self._file.write_table(table, row_group_size=len(self._rows))
        self._written += self._buffered
        self._rows, self._buffered = [], 0
        if self._written >= self._shard_bytes:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._written = None, 0


class SplitsWriter:
    """Shards of several splits, which all end together: so one place in the source tells what is finished.

    shards: how many shards each split has already. A round of shards is `full` when all together have `shard_bytes`,
    or when `rows` rows of the source, kept or not, were told by `advance`.
    """

    def __init__(self, folder: Path, kind: Kind, shards: dict[str, int], rows: int, scores: Sequence[str] = ()) -> None:
        self._writers = {
            split: ShardWriter(folder, split, kind=kind, scores=scores, first=first, shard_bytes=sys.maxsize)
            for split, first in shards.items()
        }
        self._kind: Kind = kind
        self._most, self._rows, self._bytes = rows, 0, 0

    def __enter__(self) -> "SplitsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for writer in self._writers.values():
            writer.__exit__(kind, error, at)

    def write(self, split: str, row: Row) -> None:
        """Add a row."""
        self._writers[split].write(row)
        self._bytes += sum(len(getattr(row, side)) for side in SIDES[self._kind])

    def advance(self) -> bool:
        """Count a row of the source; whether the round is full."""
        self._rows += 1
        return self._rows >= self._most or self._bytes >= SHARD_BYTES

    def end_round(self) -> dict[str, int]:
        """Finish all shards, and give their numbers by split."""
        self._rows = self._bytes = 0
        return {split: writer.end_shard() for split, writer in self._writers.items()}


def _parquet_writer(file: Path, columns: pa.Schema, sides: Sequence[str]) -> pq.ParquetWriter:
    images = [f"{side}.{part}" for side in sides for part in ("bytes", "path")]
    others = [name for name in columns.names if name not in sides]
    options: dict[str, Any] = {
        "compression": dict.fromkeys(images, "NONE") | dict.fromkeys(others, "ZSTD"),
        "use_dictionary": [name for name in others if name.endswith(_REPEATED)],
        "write_statistics": False,  # the least and greatest image of a group are of no use
        "write_page_checksum": True,  # a flipped bit is found when the page is read
    }
    return pq.ParquetWriter(file, columns, **options)


@contextmanager
def new_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill: it stands at `output` when the block ends well, and leaves nothing when it does not.

    Raises UserError where `output` is taken (with `overwrite`: by anything but a dataset of ours) or not writable.
    """
    clear_leftovers(output.resolve())
    refuse_taken(output, overwrite)
    with whole_folder(output) as partial:
        yield partial


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """As `new_folder`, in place of whatever stands at `output`."""
    target = output.resolve()  # a link to a folder stays a link
    clear_leftovers(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        _put(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
            for folder in missing:
                with suppress(OSError):  # somebody else's file stands in it by now
                    folder.rmdir()


def refuse_taken(output: Path, overwrite: bool) -> None:
    """Raises UserError where `output` is taken; with `overwrite`, only by anything but a dataset of ours."""
    try:
        if not output.exists() and not output.is_symlink():
            return
        if not output.is_dir():
            raise UserError(f"{output} exists and is no folder")
        taken = any(output.iterdir())
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    if not taken:
        return
    if not overwrite:
        raise UserError(f"{output} exists and is not empty: choose another folder, or --overwrite a dataset")
    if read_dataset_file(output) is None:
        raise UserError(f"{output} is not empty and holds no dataset of diffpref, so it is not overwritten")


def clear_leftovers(target: Path) -> None:
    """Remove what killed processes of this machine left of this output; a former dataset goes back into place."""
    for folder in target.parent.glob(f".{target.name}.*-*"):
        kind, _, process = folder.name.removeprefix(f".{target.name}.").rpartition("-")
        if kind not in ("partial", "former") or not process.isdecimal() or _lives(int(process)):
            continue
        with suppress(OSError):  # the message is that of writing, if that fails too
            if kind == "former" and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def _put(partial: Path, target: Path) -> None:
    """Rename the finished folder into place; a former dataset there goes away only after that."""
    if not target.exists():
        partial.rename(target)
        return
    former = target.with_name(f".{target.name}.former-{os.getpid()}")
    target.rename(former)
    try:
        partial.rename(target)
    except OSError:
        former.rename(target)
        raise
    shutil.rmtree(former, ignore_errors=True)
