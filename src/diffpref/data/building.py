"""What builders of one store share: who makes what, which images a dataset holds, and which cannot be read."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import struct
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.shard import KEY_BYTES
from diffpref.errors import UserError
from diffpref.files import write_whole

log = logging.getLogger("diffpref")
OLD = 24 * 3600  # seconds after which no builder is still writing a file


class Claims:
    """Which units of work this process is at: locks on bytes of one file, which end with the process, however it ends.

    Where the file system has no locks, every unit is anyone's: then work may be done twice, and nothing worse.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._file = folder / ".claims", -1

    def take(self, unit: str, wait: bool = False) -> bool:
        """Claim a unit, or wait for it; False where another process is at it."""
        if self._file < 0:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        byte = int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=8).digest(), "little") >> 2
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def release(self) -> None:
        """Give up all units that are claimed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def share(
    units: list[str],
    claims: Claims,
    make: Callable[[int], None],
    due: Callable[[], bool],
    save: Callable[[], None],
) -> None:
    """Do units of work together with any other processes that are at the same ones.

    make: does unit number n, or what others have left of it. save: brings to the disk what was made; only then does
    the claim to it end. So what a killed process had not saved is made by another.
    """
    left = list(range(len(units)))
    while left:
        waiting = []
        for unit in left:
            if not claims.take(units[unit]):
                waiting.append(unit)
                continue
            make(unit)
            if due():
                save()
                claims.release()
        save()
        claims.release()
        if waiting:
            log.info("waiting for another process that fills the same store")
            first = waiting[0]
            claims.take(units[first], wait=True)
            claims.release()
        left = waiting


class ImageNotes:
    """A few numbers of each of a dataset's images, kept in the store, so that a start need not read the images.

    rows: (rows, sides, numbers), those of `unknown` where nothing is known. name: what the files end with. sound: which
    entries (..., numbers) count as known. A file of the dataset is known by its size, its time and its footer, wherever
    it lies.
    """

    def __init__(
        self,
        folder: Path,
        dataset: PreferenceDataset,
        name: str,
        unknown: np.ndarray,
        sound: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self.rows, self._sound = np.tile(unknown, (len(dataset), len(dataset.sides), 1)), sound
        stops = [shard.first + sum(shard.groups) for shard in dataset.shards]
        self._files = [
            (range(shard.first, stop), folder / f"images-{_identity(shard.file)}.{name}")
            for shard, stop in zip(dataset.shards, stops, strict=True)
        ]
        self.refresh(range(len(dataset)))

    def refresh(self, rows: range) -> None:
        """Take in what other processes have found out of these rows since."""
        for within, file, offset in self._pieces(rows):
            known = self.rows[within.start : within.stop]
            with contextlib.suppress(OSError), file.open("rb") as opened:
                opened.seek(offset)
                kept = opened.read(known.nbytes)  # the file ends with the last row that is known
                found = np.frombuffer(kept.ljust(known.nbytes, b"\0"), known.dtype).reshape(known.shape)
                known[:] = np.where(self._sound(found)[..., None], found, known)

    def note(self, rows: range) -> None:
        """Keep what is known of these rows. Each process writes the same numbers to the same places."""
        for within, file, offset in self._pieces(rows):
            with contextlib.suppress(OSError):  # of a folder that cannot be written: then they are summed each time
                opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    os.pwrite(opened, self.rows[within.start : within.stop].tobytes(), offset)
                finally:
                    os.close(opened)

    def _pieces(self, rows: range) -> list[tuple[range, Path, int]]:
        """The parts of these rows in each file, with the place there."""
        size = self.rows[:1].nbytes
        parts = [(range(max(rows.start, own.start), min(rows.stop, own.stop)), own, file) for own, file in self._files]
        return [(part, file, (part.start - own.start) * size) for part, own, file in parts if part]


def image_hashes(folder: Path, dataset: PreferenceDataset) -> ImageNotes:
    """The SHA-256 sums of a dataset's images, uint8 (rows, sides, 32), zeros where unknown.

    What is kept is never trusted: sums that no shard holds are summed again.
    """
    return ImageNotes(
        folder, dataset, "sha256", np.zeros(KEY_BYTES, np.uint8), lambda sums: np.asarray(sums.any(axis=-1))
    )


class Unreadable:
    """Why images cannot be decoded or cut, by their SHA-256; kept in the store, so that none is tried twice."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self._own = folder / f"unreadable-{recipe}-{uuid.uuid4().hex[:12]}.json"
        self._all = (folder, f"unreadable-{recipe}-*.json")
        self._found: dict[str, str] = {}
        self._kept: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have found."""
        folder, pattern = self._all
        for file in folder.glob(pattern):
            with contextlib.suppress(OSError, ValueError, TypeError):
                self._kept |= json.loads(file.read_text(encoding="utf-8"))

    def add(self, sha: bytes, reason: str) -> None:
        self._found[sha.hex()] = reason

    def get(self, sha: bytes) -> str | None:
        """What is wrong with an image, None if nothing is known of it."""
        return self._found.get(sha.hex()) or self._kept.get(sha.hex())

    def save(self) -> None:
        """Keep what was found."""
        if self._found:
            with contextlib.suppress(UserError):  # of a folder that cannot be written: then they are tried each time
                write_whole(self._own, json.dumps(self._found).encode())


def clean(folder: Path) -> None:
    """Remove what killed builders left half written, when it is a day old."""
    now = time.time()
    for file in folder.iterdir():
        half = file.suffix in (".part", ".partial") or (
            file.suffix == ".safetensors" and not file.with_suffix(".json").exists()
        )
        if half:
            with contextlib.suppress(OSError):
                if now - file.stat().st_mtime > OLD:
                    file.unlink()


def _identity(file: Path) -> str:
    """A parquet file's size, time and footer as a hash."""
    seen = file.stat()
    with file.open("rb") as opened:
        opened.seek(max(0, seen.st_size - 8))
        (length,) = struct.unpack("<I", opened.read(4))
        opened.seek(max(0, seen.st_size - 8 - length))
        footer = opened.read()
    parts = hashlib.sha256(f"{seen.st_size} {seen.st_mtime_ns} ".encode() + footer)
    return parts.hexdigest()[:32]
