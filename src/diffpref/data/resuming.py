"""A folder that appears whole, and whose making goes on where it was killed.

What is being written lies beside the output in `.NAME.partial-KEY`; the key names the work, so that other work at the
same output is never mixed in. In it are `data/`, which is renamed to the output in the end, `journal.json`, which tells
what of `data/` is finished and is replaced by a rename, and a lock, which a killed process gives back.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffpref.data.writing import refuse_taken
from diffpref.errors import UserError
from diffpref.files import flush


class UnreachableError(UserError):
    """What is to be read cannot be had just now; what was written until then is worth keeping."""


class Partial:
    """The folder in which an output is being made. `journal` is what the last `commit` of this work said, or None."""

    def __init__(self, folder: Path, journal: dict[str, Any] | None) -> None:
        self.folder, self.journal = folder, journal
        self.data = folder / "data"

    def commit(self, journal: dict[str, Any]) -> None:
        """Say how far the work is. What it tells of must be on the disk."""
        flush(self.data)
        beside = self.folder / "journal.json.part"
        beside.write_text(json.dumps(journal), encoding="utf-8")
        flush(beside)
        beside.replace(self.folder / "journal.json")
        flush(self.folder)
        self.journal = journal


@contextmanager
def resumable_folder(output: Path, key: str, overwrite: bool = False) -> Iterator[Partial]:
    """A partial folder to fill; its `data` stands at `output` when the block ends well.

    When it does not, nothing stands there. What was committed stays for the next start, unless a UserError says that
    the work itself will not do. Raises UserError where `output` is taken (with `overwrite`: by anything but a dataset
    of ours), not writable, or being written by another process with the same key.
    """
    target, folder = _places(output, key)
    missing = [parent for parent in target.parents if not parent.exists()]
    mend(output, key)
    refuse_taken(output, overwrite)
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, output)
        _tell_of_others(folder, target)
        partial = Partial(folder, _read_journal(folder))
        if partial.journal is None:
            shutil.rmtree(partial.data, ignore_errors=True)
        partial.data.mkdir(exist_ok=True)
        yield partial
        _put(folder, target)
        _remove(folder, [])
    except UserError as error:  # of the lock, nothing here is ours
        if lock is not None and not (isinstance(error, UnreachableError) and _kept(folder, output)):
            _remove(folder, missing)
        raise
    except BaseException as error:
        if lock is not None and not _kept(folder, output):
            _remove(folder, missing)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {output}: {error.strerror or error}") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _locked(folder: Path, output: Path) -> int:
    """The lock of the folder, which ends with the process at the latest."""
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"another process is writing {output} just now") from None
    return lock


def _put(folder: Path, target: Path) -> None:
    """Rename the finished data into place; a former dataset there goes away only after that."""
    if target.exists():
        target.rename(folder / "former")
    try:
        (folder / "data").rename(target)
    except OSError:
        if (folder / "former").exists():
            (folder / "former").rename(target)
        raise
    flush(target.parent)


def _places(output: Path, key: str) -> tuple[Path, Path]:
    """Where the output stands in the end, and where it is being made."""
    target = output.resolve()  # a link to a folder stays a link
    return target, target.with_name(f".{target.name}.partial-{key}")


def mend(output: Path, key: str) -> None:
    """Make good what a kill within the last renames left: the former dataset goes back, a finished folder away."""
    target, folder = _places(output, key)
    former, data = folder / "former", folder / "data"
    if not folder.is_dir() or (data.exists() and not former.exists()):
        return
    try:
        lock = _locked(folder, output)
        if former.exists() and not target.exists():
            former.rename(target)
        elif not data.exists():
            _remove(folder, [])
        os.close(lock)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def _read_journal(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "journal.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _kept(folder: Path, output: Path) -> bool:
    """Whether there is something to go on from; if so, say so."""
    if not (folder / "journal.json").exists():
        return False
    print(
        f"diffpref: what is finished of {output} stays in {folder}; the same command goes on from it", file=sys.stderr
    )
    return True


def _tell_of_others(folder: Path, target: Path) -> None:
    for other in sorted(folder.parent.glob(f".{target.name}.partial-*")):
        if other != folder:
            print(f"diffpref: {other} is left of another unfinished command; it is not used", file=sys.stderr)


def _remove(folder: Path, missing: list[Path]) -> None:
    """Remove the folder, and of its parents those that were not there before, as far as they are empty."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in missing:
        with suppress(OSError):  # somebody else's file stands in it by now
            parent.rmdir()
