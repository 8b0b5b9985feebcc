"""Files: sums, what must be on the disk, and results that are written whole or not at all."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from diffpref.errors import RunError, UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256(path: Path) -> str:
    """The SHA-256 sum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(files: Iterable[Path]) -> str:
    """A name for what is in files, without reading them: from what changes whenever one is written.

    `changed` and size alone are kept by some copies. Raises OSError for a file that is not there.
    """
    told = hashlib.sha256()
    for file in files:
        stat = file.stat()
        parts = (file.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        told.update(repr(parts).encode("utf-8", "surrogatepass"))
    return told.hexdigest()[:24]


def stays_inside(name: str) -> bool:
    """Whether a file name from a list or an archive, with `/` between folders, stays inside its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room on a disk, in a quota, or for so large a file.

    Libraries that write files themselves (safetensors, pyarrow, shutil) tell it in words alone.
    """
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return True
    return any(os.strerror(code) in str(error) for code in NO_ROOM)


def no_room(place: Path) -> str:
    """One line, without its end: that the disk of a place is full, and how many bytes are free there."""
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    return f"no space left on the disk of {place}, where {shutil.disk_usage(there).free:,} bytes are free"


@contextmanager
def made_beside(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `target` when the block ends well, and goes away when it does not."""
    beside, former = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "former"))
    shutil.rmtree(beside, ignore_errors=True)  # a killed process's
    if former.exists() and not target.exists():
        former.rename(target)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(former, ignore_errors=True)
        if target.exists():
            target.rename(former)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)


def flush(path: Path) -> None:
    """Bring a file, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it there, so that no reader ever sees half of it.

    Raises UserError where the place cannot be written, RunError where the disk is full.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        if disk_full(error):
            raise RunError(f"cannot write {path}: {no_room(path.parent)}") from None
        raise UserError(f"cannot write {path}: {error.strerror}") from None
