"""All shards of one kind as one table of tensors under content keys; every row that is read is checked."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffpref.data.shard import KEY_BYTES, Shard, damaged, open_shard
from diffpref.errors import UserError

BLOCK_BYTES = 256 * 2**10  # of rows that are read together: what a processor's cache holds


def key_of(text: str) -> bytes:
    """The key of a text: its SHA-256."""
    return hashlib.sha256(text.encode()).digest()


def as_keys(keys: list[bytes]) -> np.ndarray:
    """Keys as an array, uint8 (n, 32)."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


class Shards:
    """All complete shards of one kind and recipe, but for damaged rows, which are to be made again.

    summed: sum every shard even if its size and time are those that were noted.
    damaged: the shards of which rows are missing.
    """

    def __init__(self, folder: Path, kind: str, recipe: str, summed: bool = False) -> None:
        self.damaged: list[Path] = []
        self.recipe = recipe
        self._sidecars, self._seen, self._summed = (folder, f"{kind}-{recipe}-*.json"), set[Path](), summed
        self._shards: list[Shard] = []
        self._heads = self._places = np.empty(0, np.uint64)
        self.refresh()

    def refresh(self) -> None:
        """Take in the shards that were written since; those known already are not opened again."""
        folder, pattern = self._sidecars
        found = sorted(set(folder.glob(pattern)) - self._seen)
        for sidecar in found:
            self._seen.add(sidecar)
            try:
                shard = open_shard(sidecar, self._summed)
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
        self._large = all(shard.is_large for shard in self._shards)

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

        Small rows are gathered and summed some at a time, while the processor has them at hand, and then made fp32.
        Raises RunError for a row that is damaged; the next start makes it anew.
        """
        first = self._shards[int(places[0]) >> 32]
        dtype, shape = first.form
        stored = torch.from_numpy(np.empty(0, dtype)).dtype
        out = torch.empty(len(places), *shape, dtype=torch.float32 if stored.is_floating_point else stored)
        shards, rows = places >> 32, places & 0xFFFFFFFF
        if self._large:
            self._copy(shards, rows, out)
            return out
        size = max(1, BLOCK_BYTES // first.row_bytes)
        for start in range(0, len(places), size):
            block = slice(start, start + size)
            content = self._block(shards[block], rows[block], first.row_bytes)
            out[block] = content.view(stored).view(-1, *shape)
        return out

    def _copy(self, shards: np.ndarray, rows: np.ndarray, out: Tensor) -> None:
        """Fill `out` with large rows of shards."""
        each = out.unbind()
        for number in np.unique(shards):
            of = np.flatnonzero(shards == number)
            if not self._shards[number].copy(rows[of].tolist(), [each[place] for place in of]):
                raise damaged(self._shards[number].file)

    def _block(self, shards: np.ndarray, rows: np.ndarray, row_bytes: int) -> Tensor:
        """The bytes of rows of shards, uint8 (n, row_bytes)."""
        content = torch.empty(len(rows), row_bytes, dtype=torch.uint8)
        for number in np.unique(shards):
            of = np.flatnonzero(shards == number)
            found = self._shards[number].read(rows[of])
            if found is None:
                raise damaged(self._shards[number].file)
            if len(of) == len(rows):
                return found
            content[torch.from_numpy(of)] = found
        return content

    def rows(self, keys: np.ndarray) -> Tensor:
        """The rows of keys (n, 32), as `at`; raises UserError for a key that is not stored."""
        places = self.find(keys)
        if (places < 0).any():
            missing = keys[places < 0][0].tobytes().hex()
            raise UserError(f"the store lacks {missing}; build it again with `diffpref data cache`")
        return self.at(places)


def _heads(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]
