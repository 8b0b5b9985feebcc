"""A shard of tensors under content keys: a safetensors file read through mmap, in which no flipped bit goes unseen.

A shard is `KIND-RECIPE-UNIQUE.safetensors`. Its tensors: `rows`, fp16 but for masks and whole numbers; `keys`, 32 bytes
a row; `sums`, the XXH3 (64 bits) of each row's bytes, which every read is checked against. Rows whose ends are zeros
may be stored without these ends; then `rows` has them one behind the other, and `ends` says where each one stops.

It is complete when its sidecar `....json` stands beside it: the file's SHA-256, size and time, and the XXH3 of all
that is not rows. The SHA-256 is summed when size or time are others than noted. Both files are written under another
name, flushed and renamed, so a killed builder leaves nothing that is read, and several builders never touch one
another's files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import struct
import time
import uuid
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor
from xxhash import xxh3_64, xxh3_64_intdigest

from diffpref.errors import RunError
from diffpref.files import flush, sha256

SHARD_BYTES, SHARD_SECONDS = 256 * 2**20, 120  # a shard is due when so much is together, or so old
DTYPES = {"F16": "f2", "BOOL": "?", "U8": "u1", "I32": "i4", "I64": "i8", "U64": "u8"}  # safetensors' names
KEY_BYTES = 32
LARGE_BYTES = 8 * 2**10  # rows from here on are not gathered first: one call a row costs less than a copy


@dataclass(frozen=True)
class Sidecar:
    """What is noted of a shard. frame: XXH3 of all that is not rows. lost: rows that were found damaged."""

    sha256: str
    bytes: int
    mtime_ns: int
    frame: int
    lost: tuple[int, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Sidecar:
        """Raises OSError, ValueError, KeyError or TypeError for one that cannot be read."""
        entry = json.loads(path.read_text(encoding="utf-8"))
        size, changed, frame = (int(entry[name]) for name in ("bytes", "mtime_ns", "frame"))
        return cls(str(entry["sha256"]), size, changed, frame, tuple(int(row) for row in entry["lost"]))

    def write(self, path: Path) -> None:
        """Write it whole, under a name of its own first: several processes may note the same thing at once."""
        part = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}.part")
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        flush(part)
        part.rename(path)


class TensorWriter:
    """Collects rows; `close` writes them as one shard, which is `due` when enough is together.

    trimmed: zeros at the rows' ends are not stored where that saves room.
    """

    def __init__(self, folder: Path, kind: str, recipe: str, trimmed: bool = False) -> None:
        self._folder, self._stem, self._trimmed = folder, f"{kind}-{recipe}", trimmed
        self._keys: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._bytes, self._since = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, keys: np.ndarray, rows: Tensor) -> None:
        """Add rows (n, ...) under keys (n, 32); stored as fp16, or as they are if they are bool or whole numbers.

        Raises RunError for values that fp16 cannot hold, PermissionError where no shard could be written.
        """
        if not os.access(self._folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._folder))
        kept = rows.to("cpu", torch.float16 if rows.is_floating_point() else rows.dtype)
        finite = kept.reshape(len(kept), -1).isfinite().all(dim=1)
        if not finite.all():
            raise RunError(f"{self._stem}: not finite in fp16: {keys[int((~finite).nonzero()[0])].tobytes().hex()}")
        self._since = self._since or time.monotonic()
        self._keys.append(keys)
        self._rows.append(kept.contiguous().numpy())
        self._bytes += kept.nbytes

    @property
    def due(self) -> bool:
        """Whether enough is together for a shard, or has waited long enough."""
        waiting = bool(self._since) and time.monotonic() - self._since > SHARD_SECONDS
        return waiting or self._bytes >= SHARD_BYTES

    def close(self) -> None:
        """Write what is collected as one shard."""
        if not self._keys:
            return
        stem = f"{self._stem}-{uuid.uuid4().hex[:12]}"
        part, shard = self._folder / f"{stem}.part", self._folder / f"{stem}.safetensors"
        content = _content(np.concatenate(self._keys), np.concatenate(self._rows), self._trimmed)
        try:
            part.write_bytes(content)
            flush(part)
            part.rename(shard)
            noted = Sidecar(hashlib.sha256(content).hexdigest(), len(content), shard.stat().st_mtime_ns, _frame(shard))
            noted.write(shard.with_suffix(".json"))
        finally:
            part.unlink(missing_ok=True)
        self._keys, self._rows, self._bytes, self._since = [], [], 0, 0.0


def _content(keys: np.ndarray, rows: np.ndarray, trimmed: bool) -> bytes:
    tensors, told = {"keys": keys}, {}
    ends = _without_zeros(rows) if trimmed and rows.ndim > 1 else None
    if ends is not None and rows[0, 0].nbytes * (rows.shape[1] * len(rows) - int(ends.sum())) > ends.nbytes:
        told = {"length": str(rows.shape[1])}
        kept = [row[:end] for row, end in zip(rows, ends, strict=True)]
        tensors |= {"rows": np.concatenate(kept), "ends": ends.cumsum()}
    else:
        kept = list(rows)
        tensors["rows"] = rows
    tensors["sums"] = np.array([xxh3_64_intdigest(row.tobytes()) for row in kept], np.uint64)
    return save(tensors, metadata=told)


def _without_zeros(rows: np.ndarray) -> np.ndarray:
    """For each row the length without the zeros at its end, int64; by bits, for -0.0 is to come back as it was."""
    bits = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), rows.shape[1], -1)
    told = np.any(bits, axis=2)
    return np.where(told.any(axis=1), rows.shape[1] - told[:, ::-1].argmax(axis=1), 0).astype(np.int64)


@dataclass(frozen=True)
class _Part:
    """Where a tensor lies in its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    first: int
    stop: int


def _parts(file: Path) -> tuple[dict[str, _Part], dict[str, str], int]:
    """Where the tensors lie, the metadata, and the length of the header. Raises as `Sidecar.read`."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError("the header is longer than the file")
        header = json.loads(opened.read(length))
    told = header.pop("__metadata__", {})
    found = {}
    for name, entry in header.items():
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
        first, stop = (8 + length + offset for offset in entry["data_offsets"])
        if stop - first != dtype.itemsize * math.prod(shape) or stop > file.stat().st_size:
            raise ValueError(f"{name} is not as long as its shape says")
        found[name] = _Part(dtype, shape, first, stop)
    return found, told, 8 + length


def _frame(file: Path) -> int:
    """XXH3 of all that is not rows. Raises as `Sidecar.read`."""
    parts, _, header = _parts(file)
    found = xxh3_64(_read(file, 0, header))
    for name in sorted(set(parts) - {"rows"}):
        found.update(_read(file, parts[name].first, parts[name].stop))
    return found.intdigest()


def _read(file: Path, first: int, stop: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(first)
        return opened.read(stop - first)


class Shard:
    """An opened shard. keys: uint8 (n, 32). intact: of each row whether it is not known to be lost."""

    def __init__(self, file: Path, sidecar: Sidecar) -> None:
        self.file, self.size = file, sidecar.bytes
        parts, told, _ = _parts(file)
        if _frame(file) != sidecar.frame:
            raise ValueError("not the frame that was written")
        others = {name: part for name, part in parts.items() if name != "rows"}
        columns = {name: np.frombuffer(_read(file, at.first, at.stop), at.dtype) for name, at in others.items()}
        self._rows, count = parts["rows"], len(columns["sums"])
        self.keys, self._sums = columns["keys"].reshape(count, KEY_BYTES), columns["sums"]
        rest = self._rows.shape[1:]
        self._ends = columns.get("ends")  # in units of `rest`
        self._unit = self._rows.dtype.itemsize * math.prod(rest)
        self.form = (self._rows.dtype, rest if self._ends is None else (int(told["length"]), *rest))
        self.row_bytes = self.form[0].itemsize * math.prod(self.form[1])  # of a whole row
        self.intact = np.ones(count, bool)
        self.intact[list(sidecar.lost)] = False

    @cached_property
    def _bytes(self) -> Tensor:
        """The rows' bytes, mapped when first needed; torch's map, unlike numpy's, holds no open file."""
        mapped = torch.from_file(str(self.file), shared=False, size=self.size, dtype=torch.uint8)
        return mapped[self._rows.first : self._rows.stop]

    @cached_property
    def _whole(self) -> tuple[tuple[Tensor, ...], memoryview, list[int]]:
        """Each row in its dtype, the bytes of all, and their sums; of rows that are stored whole."""
        rows = self._bytes.view(torch.from_numpy(np.empty(0, self.form[0])).dtype).view(-1, *self.form[1])
        return rows.unbind(), self._bytes.numpy().data, self._sums.tolist()

    @property
    def is_large(self) -> bool:
        """Whether rows are stored whole, and `copy` is the faster way to read them."""
        return self._ends is None and self.row_bytes >= LARGE_BYTES

    def copy(self, rows: list[int], out: list[Tensor]) -> bool:
        """Fill each of `out` with a row; False where one is not what was written."""
        (whole, content, sums), size = self._whole, self.row_bytes
        for row, into in zip(rows, out, strict=True):
            into.copy_(whole[row])
            if xxh3_64_intdigest(content[row * size : (row + 1) * size]) != sums[row]:
                return False
        return True

    def read(self, rows: np.ndarray) -> Tensor | None:
        """The bytes of whole rows, uint8 (n, row_bytes); None where some are not those that were written."""
        if self._ends is None:
            out = self._bytes.view(-1, self.row_bytes).index_select(0, torch.from_numpy(rows))
            lengths = None
        else:
            out = torch.zeros(len(rows), self.row_bytes, dtype=torch.uint8)
            stops = self._unit * self._ends[rows]
            starts = np.where(rows > 0, self._unit * self._ends[rows - 1], 0)
            lengths = (stops - starts).tolist()
            for row, start, length in zip(out, starts.tolist(), lengths, strict=True):
                row[:length] = self._bytes[start : start + length]
        views = (row.data for row in out.numpy())
        written = views if lengths is None else (view[:length] for view, length in zip(views, lengths, strict=True))
        sums = np.fromiter(map(xxh3_64_intdigest, written), np.uint64, len(rows))
        return out if (sums == self._sums[rows]).all() else None

    def lost(self) -> tuple[int, ...]:
        """The rows that are not what was written."""
        return tuple(row for row in range(len(self._sums)) if self.read(np.array([row])) is None)


def open_shard(sidecar: Path, summed: bool) -> Shard:
    """Open a shard, and sum it if it is not as it was noted. Raises as `Sidecar.read` where all of it is lost."""
    file, noted = sidecar.with_suffix(".safetensors"), Sidecar.read(sidecar)
    seen = file.stat()
    if seen.st_size != noted.bytes:
        raise ValueError("not as long as it was written")
    shard = Shard(file, noted)
    if summed or seen.st_mtime_ns != noted.mtime_ns:
        digest = sha256(file)
        lost = noted.lost if digest == noted.sha256 else shard.lost()
        shard.intact[list(lost)] = False
        with contextlib.suppress(OSError):  # of a folder that cannot be written: then it is summed each time
            replace(noted, sha256=digest, mtime_ns=seen.st_mtime_ns, lost=lost).write(sidecar)
    return shard


def damaged(file: Path) -> RunError:
    """What to raise for a damaged shard, which the next start is made to sum."""
    sidecar = file.with_suffix(".json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        replace(Sidecar.read(sidecar), mtime_ns=0).write(sidecar)
    return RunError(f"{file} is damaged; start again (with --resume), and what it lacks is made anew")
