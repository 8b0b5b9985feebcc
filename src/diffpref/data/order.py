"""The order of items: which one stands at a place, as a pure function of the seed and the place.

Places come in runs, and a run has one shape: an optimizer step's items go through the network together, however they
are split into micro-batches and processes. Each bucket hands out its items in passes without end, every pass a new
permutation; its runs are the pieces of that stream. After e epochs a bucket of n items has given as many whole runs as
e n items make, and what is left over, less than one run, comes first in the next epoch. So no item is left out, none
comes again before all others of its bucket have come, and every item comes equally often. In an epoch the buckets' runs
come in a drawn order. A single bucket is a plain sequence of permutations, whatever the run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from diffpref.draws import block_permutation, draw_seed, permutation


@dataclass(frozen=True)
class Order:
    """The order of the items of some buckets.

    members: the items of each bucket that has any, int64. run: how many places in a row share a bucket. block: items of
    a bucket that are shuffled as one, None for a full shuffle.
    """

    seed: int
    members: tuple[np.ndarray, ...]
    run: int = 1
    block: int | None = None

    @cached_property
    def count(self) -> int:
        """The number of all items."""
        return sum(len(items) for items in self.members)

    def item(self, place: int, later: int = 0) -> int:
        """The item at a place, or the one that comes so much later in the same pass of its bucket."""
        items, turn, k = self._stands(place)
        return int(items[self._passes(turn, len(items))[(k + later) % len(items)]])

    def turn(self, place: int) -> int:
        """How often the item at a place has come before: the number of its bucket's pass."""
        return self._stands(place)[1]

    def _stands(self, place: int) -> tuple[np.ndarray, int, int]:
        """Of a place the items of its bucket, the number of their pass, and the place in that pass."""
        number, within = divmod(place, self.run)
        epoch = self._epoch_of(number)
        buckets, runs = self._dealt(epoch)
        at = number - self._runs_before(epoch)
        items = self.members[buckets[at]]
        return items, *divmod(int(runs[at]) * self.run + within, len(items))

    def _runs_before(self, epoch: int) -> int:
        """How many runs the epochs before this one have."""
        return sum(epoch * len(items) // self.run for items in self.members)

    def _epoch_of(self, number: int) -> int:
        """The epoch of a run: the last one that does not begin after it."""
        least = number * self.run // self.count
        most = (number + len(self.members) + 1) * self.run // self.count + 1
        return least + bisect_right(range(least, most + 1), number, key=self._runs_before) - 1

    @cached_property
    def _dealt(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """Of an epoch each run's bucket, and which run of the bucket's stream it is: int64 (runs,) each."""

        def deal(epoch: int) -> tuple[np.ndarray, np.ndarray]:
            first, stop = ([e * len(items) // self.run for items in self.members] for e in (epoch, epoch + 1))
            buckets = np.repeat(np.arange(len(self.members)), np.subtract(stop, first))
            runs = np.concatenate([np.arange(a, b) for a, b in zip(first, stop, strict=True)])
            drawn = np.random.default_rng(draw_seed(self.seed, "buckets", epoch)).permutation(buckets)
            dealt = np.empty_like(runs)
            dealt[drawn.argsort(kind="stable")] = runs  # the runs of a bucket keep their order
            return drawn, dealt

        return lru_cache(2)(deal)

    @cached_property
    def _passes(self) -> Callable[[int, int], np.ndarray]:
        """The permutation of a pass over so many items, for each bucket the latest ones kept."""

        def order(turn: int, count: int) -> np.ndarray:
            if self.block is None:
                return permutation(self.seed, turn, count)
            return block_permutation(self.seed, turn, count, self.block)

        return lru_cache(2 * len(self.members))(order)
