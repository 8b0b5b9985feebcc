"""Files: sums, what must be on the disk, and results that are written whole or not at all."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from diffpref.errors import UserError


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


def flush(path: Path) -> None:
    """Bring a file, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it there, so that no reader ever sees half of it.

    Raises UserError where the place cannot be written.
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
        raise UserError(f"cannot write {path}: {error.strerror}") from None
