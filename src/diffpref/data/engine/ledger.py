"""The ledger: finished units as files, and claims that a dead process cannot keep."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.data.engine.stage import Stage
from diffpref.errors import UserError
from diffpref.files import flush, write_whole


def ledger_of(dataset: Path, folder: Path | None = None) -> Path:
    """The ledger's folder: as given, or `DATASET.answers` beside the dataset."""
    return folder or dataset.resolve().with_name(f"{dataset.resolve().name}.answers")


class Claims:
    """Names that one process at a time can hold, among all that open the same file.

    A claim is a POSIX lock on the byte whose number the name spells (hex). The kernel takes it back when the process
    ends, so there is no claim of a dead process, no age to guess from and nothing to clean up; over NFS it is the
    server that does so. Within one process claims do not exclude one another.
    """

    def __init__(self, file: Path) -> None:
        self._name = file
        self._file = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether the name is ours for the length of the block; False where another process holds it."""
        place = int(name[:15], 16)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                yield False
                return
            raise UserError(f"{self._name} cannot be locked ({error.strerror}): choose another --ledger") from error
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)


class Ledger:
    """One stage's folder: its finished units, and the claims upon those that are not."""

    def __init__(self, folder: Path, stage: Stage) -> None:
        self.root = folder
        self.folder = folder / f"{stage.name}-{stage.key}"
        self._schema = stage.schema
        text = json.dumps(
            {"stage": stage.name, "answers": stage.answers, **stage.identity}, indent=2, ensure_ascii=False
        )
        with writing(self.folder / "claims"):
            self.claims = Claims(self.folder / "claims")
        with self.claims.claim("0") as mine:  # else another process writes it just now
            if mine and not (self.folder / "stage.json").is_file():
                write_whole(self.folder / "stage.json", f"{text}\n".encode())
        self._refuse_other(json.loads(text))

    def _refuse_other(self, told: dict) -> None:
        """Raise UserError where the folder says that its answers are another tool's: somebody moved or changed it."""
        try:
            held = json.loads((self.folder / "stage.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if held != told:
            raise UserError(f"{self.folder} holds answers of {held}, not of {told}: move it away")

    def finished(self) -> set[str]:
        """The names of the units that are there."""
        return {file.stem for file in self.folder.glob("[!.]*.parquet")}

    def has(self, name: str) -> bool:
        """Whether a unit is there."""
        return self._file(name).is_file()

    def write(self, name: str, answers: pa.Table) -> None:
        """Put a unit's answers in their place, on the disk, whole. Its claim must be held."""
        write_table(self._file(name), answers)

    def read(self, name: str) -> pa.Table | None:
        """A unit's answers. None where they are absent or damaged; damaged ones are removed, to be made again."""
        table = read_table(self._file(name))
        if table is not None and table.schema.equals(self._schema):
            return table
        self._file(name).unlink(missing_ok=True)
        return None

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.parquet"


def write_table(file: Path, table: pa.Table) -> None:
    """A small parquet file, written beside, flushed and renamed. Raises UserError where it cannot be written."""
    beside = file.with_name(f".{file.name}.partial")
    with writing(file):
        try:
            pq.write_table(table, beside, compression="zstd", write_page_checksum=True, write_statistics=False)
            flush(beside)
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
        flush(file.parent)


def read_table(file: Path) -> pa.Table | None:
    """The table in a file, None where there is none or it is damaged."""
    try:
        return pq.ParquetFile(file, page_checksum_verification=True).read(use_threads=False)
    except (OSError, pa.ArrowException):
        return None


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what the system says of a place that cannot be written into a UserError."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror or error} (--ledger names another folder)") from error
