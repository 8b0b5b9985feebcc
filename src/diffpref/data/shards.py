"""Shards of tensors under content keys: safetensors files read through mmap, in which no flipped bit goes unseen.

A shard is `KIND-RECIPE-UNIQUE.safetensors`. Its tensors: `rows`, fp16 but for masks and whole numbers; `keys`, 32 bytes
a row; `sums`, the CRC-32 of each row's bytes, which every read is checked against. Rows whose ends are zeros may be
stored without these ends; then `rows` has them one behind the other, and `ends` says where each one stops.

It is complete when its sidecar `....json` stands beside it: the file's SHA-256, size and time, and the CRC-32 of all
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
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from diffpref.errors import RunError, UserError
from diffpref.files import flush, sha256

SHARD_BYTES, SHARD_SECONDS = 256 * 2**20, 120  # a shard is due when so much is together, or so old
DTYPES = {"F16": "f2", "BOOL": "?", "U8": "u1", "I32": "i4", "I64": "i8", "U32": "u4"}  # safetensors' names
KEY_BYTES = 32
BLOCK_BYTES = 256 * 2**10  # of rows that are read together: what a processor's cache holds


def key_of(text: str) -> bytes:
    """The key of a text: its SHA-256."""
    return hashlib.sha256(text.encode()).digest()


def as_keys(keys: list[bytes]) -> np.ndarray:
    """Keys as an array, uint8 (n, 32)."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


@dataclass(frozen=True)
class Sidecar:
    """What is noted of a shard. frame: CRC-32 of all that is not rows. lost: rows that were found damaged."""

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
    tensors["sums"] = np.array([zlib.crc32(row.tobytes()) for row in kept], np.uint32)
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
    """CRC-32 of all that is not rows. Raises as `Sidecar.read`."""
    parts, _, header = _parts(file)
    found = zlib.crc32(_read(file, 0, header))
    for name in sorted(set(parts) - {"rows"}):
        found = zlib.crc32(_read(file, parts[name].first, parts[name].stop), found)
    return found


def _read(file: Path, first: int, stop: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(first)
        return opened.read(stop - first)


class _Shard:
    """An opened shard. keys: uint8 (n, 32). intact: of each row whether it is not known to be lost."""

    def __init__(self, file: Path, sidecar: Sidecar) -> None:
        self.file, self.size = file, sidecar.bytes
        parts, told, _ = _parts(file)
        if _frame(file) != sidecar.frame:
            raise ValueError("not the frame that was written")
        others = {name: part for name, part in parts.items() if name != "rows"}
        columns = {name: np.frombuffer(_read(file, at.first, at.stop), at.dtype) for name, at in others.items()}
        self._rows, count = parts["rows"], len(columns["sums"])
        self.keys, self._sums = columns["keys"].reshape(count, KEY_BYTES), memoryview(columns["sums"])
        rest = self._rows.shape[1:]
        unit = self._rows.dtype.itemsize * math.prod(rest)
        self._ends = memoryview(unit * (columns["ends"] if "ends" in columns else np.arange(1, count + 1)))
        self.form = (self._rows.dtype, (int(told["length"]), *rest) if "ends" in columns else rest)
        self.intact = np.ones(count, bool)
        self.intact[list(sidecar.lost)] = False

    @cached_property
    def _bytes(self) -> memoryview:
        """The rows' bytes, mapped when first needed; torch's map, unlike numpy's, holds no open file."""
        mapped = torch.from_file(str(self.file), shared=False, size=self.size, dtype=torch.uint8).numpy()
        return memoryview(mapped)[self._rows.first : self._rows.stop]

    @property
    def row_bytes(self) -> int:
        """The size of a whole row."""
        return self.form[0].itemsize * math.prod(self.form[1])

    def copy_row(self, row: int, out: memoryview) -> bool:
        """Fill `out` with a whole row's bytes; False where they are not those that were written."""
        start, stop = self._ends[row - 1] if row else 0, self._ends[row]
        into = out[: stop - start]
        into[:] = self._bytes[start:stop]
        if len(into) < len(out):
            out[len(into) :] = bytes(len(out) - len(into))
        return zlib.crc32(into) == self._sums[row]

    def lost(self) -> tuple[int, ...]:
        """The rows that are not what was written."""
        room = memoryview(bytearray(self.row_bytes))
        return tuple(row for row in range(len(self._ends)) if not self.copy_row(row, room))


class Shards:
    """All complete shards of one kind and recipe, but for damaged rows, which are to be made again.

    summed: sum every shard even if its size and time are those that were noted.
    damaged: the shards of which rows are missing.
    """

    def __init__(self, folder: Path, kind: str, recipe: str, summed: bool = False) -> None:
        self.damaged: list[Path] = []
        self._sidecars, self._seen, self._summed = (folder, f"{kind}-{recipe}-*.json"), set[Path](), summed
        self._shards: list[_Shard] = []
        self._heads = self._places = np.empty(0, np.uint64)
        self.refresh()

    def refresh(self) -> None:
        """Take in the shards that were written since; those known already are not opened again."""
        folder, pattern = self._sidecars
        found = sorted(set(folder.glob(pattern)) - self._seen)
        for sidecar in found:
            self._seen.add(sidecar)
            try:
                shard = _opened(sidecar, self._summed)
            except (OSError, ValueError, KeyError, TypeError, IndexError, struct.error):
                self.damaged.append(sidecar.with_suffix(".safetensors"))
                continue
            if not shard.intact.all():
                self.damaged.append(shard.file)
            self._shards.append(shard)
        if found:
            self._sort()

    def _sort(self) -> None:
        """Order all places by the first 8 bytes of their keys."""
        places = [np.flatnonzero(s.intact).astype(np.uint64) | np.uint64(n << 32) for n, s in enumerate(self._shards)]
        heads = [_heads(shard.keys[shard.intact]) for shard in self._shards]
        self._heads, self._places = (np.concatenate([*each, np.empty(0, np.uint64)]) for each in (heads, places))
        order = self._heads.argsort(kind="stable")
        self._heads, self._places = self._heads[order], self._places[order]

    def __len__(self) -> int:
        """The number of rows, those that are stored twice counted twice."""
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """The size of the files."""
        return sum(shard.size for shard in self._shards)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row; raises UserError where there is none."""
        if not self._shards:
            raise UserError(f"{self._sidecars[0]} holds no {self._sidecars[1]}")
        return self._shards[0].form[1]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Where the rows of keys (n, 32) stand, for `at`: int64 (n,), -1 for a key that is not stored."""
        heads = _heads(keys)
        at = np.searchsorted(self._heads, heads)
        found = np.full(len(keys), -1, np.int64)
        left = np.arange(len(keys))
        while len(left := left[at[left] < len(self._heads)]):
            left = left[self._heads[at[left]] == heads[left]]
            places = self._places[at[left]].astype(np.int64)
            same = self._same(places, keys[left])
            found[left[same]] = places[same]
            left = left[~same]  # another key of the same 8 bytes: look at the next
            at[left] += 1
        return found

    def _same(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        same, shards = np.zeros(len(places), bool), places >> 32
        for shard in np.unique(shards):
            of = np.flatnonzero(shards == shard)
            same[of] = (self._shards[shard].keys[places[of] & 0xFFFFFFFF] == keys[of]).all(axis=1)
        return same

    def at(self, places: np.ndarray) -> Tensor:
        """The rows at places from `find`, (n, ...), fp32 but for masks and whole numbers; each checked against its sum.

        They are copied and summed a few at a time, while the processor has them at hand, and then made fp32.
        Raises RunError for a row that is damaged; the next start makes it anew.
        """
        first = self._shards[int(places[0]) >> 32]
        dtype, shape = first.form
        block = min(len(places), max(1, BLOCK_BYTES // first.row_bytes))
        content = np.empty((block, first.row_bytes), np.uint8)
        rooms = [memoryview(row) for row in content]
        stored = torch.from_numpy(content.reshape(-1).view(dtype).reshape(block, *shape))
        out = torch.empty(len(places), *shape, dtype=torch.float32 if stored.is_floating_point() else stored.dtype)
        for start in range(0, len(places), block):
            part = places[start : start + block].tolist()
            for place, room in zip(part, rooms, strict=False):
                shard = self._shards[place >> 32]
                if not shard.copy_row(place & 0xFFFFFFFF, room):
                    _distrust(shard.file)
                    raise RunError(
                        f"{shard.file} is damaged; start again (with --resume), and what it lacks is made anew"
                    )
            out[start : start + block] = stored[: len(part)]
        return out

    def rows(self, keys: np.ndarray) -> Tensor:
        """The rows of keys (n, 32), as `at`; raises UserError for a key that is not stored."""
        places = self.find(keys)
        if (places < 0).any():
            missing = keys[places < 0][0].tobytes().hex()
            raise UserError(f"the store lacks {missing}; build it again with `diffpref data cache`")
        return self.at(places)


def _opened(sidecar: Path, summed: bool) -> _Shard:
    """Open a shard, and sum it if it is not as it was noted. Raises as `Sidecar.read` where all of it is lost."""
    file, noted = sidecar.with_suffix(".safetensors"), Sidecar.read(sidecar)
    seen = file.stat()
    if seen.st_size != noted.bytes:
        raise ValueError("not as long as it was written")
    shard = _Shard(file, noted)
    if summed or seen.st_mtime_ns != noted.mtime_ns:
        digest = sha256(file)
        lost = noted.lost if digest == noted.sha256 else shard.lost()
        shard.intact[list(lost)] = False
        with contextlib.suppress(OSError):  # of a folder that cannot be written: then it is summed each time
            replace(noted, sha256=digest, mtime_ns=seen.st_mtime_ns, lost=lost).write(sidecar)
    return shard


def _distrust(file: Path) -> None:
    """Have the next start sum a shard."""
    sidecar = file.with_suffix(".json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        replace(Sidecar.read(sidecar), mtime_ns=0).write(sidecar)


def _heads(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]
