"""The next batch is made while the present one is trained on; which one it is, is arithmetic, so nothing can differ."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from diffpref.data.loader import Loader
from diffpref.types import Batch


class Ahead:
    """Batches of a loader, whose host side is made one call ahead in a thread.

    A loader that runs a network for its batches is not read ahead: that work would run beside the step, in its memory.
    waited: the seconds that calls have taken so far.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader, self.waited = loader, 0.0
        self._pool = None if loader.store.computes else ThreadPoolExecutor(1, "data")
        self._next: tuple[list[int], Future[Batch]] | None = None

    def batch(self, places: list[int], following: Callable[[], list[int]]) -> Batch:
        """The batch of these places, and the start on that of the following ones.

        What goes wrong in the thread is raised here, by the call that asks for that batch.
        """
        started = time.perf_counter()
        waiting, self._next = self._next, None
        made = waiting[1].result() if waiting and waiting[0] == places else self.loader.collect(places)
        if self._pool:
            later = following()
            self._next = later, self._pool.submit(self.loader.collect, later)
        found = self.loader.deliver(made)
        self.waited += time.perf_counter() - started
        return found

    def close(self) -> None:
        """End the thread, after what it is at."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
