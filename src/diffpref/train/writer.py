"""Checkpoints are written in a thread while the training goes on; the loop waits for the copy to the host alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from diffpref.errors import RunError, first_line
from diffpref.train.checkpoint import Checkpoint, Host

log = logging.getLogger("diffpref")


class Writer:
    """Writes one checkpoint at a time. waited: the seconds that the training has stood still for it so far."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._host = Host()
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._step = 0
        self._writing: Future[Path] | None = None

    def write(self, copy: Callable[[Host], Checkpoint], save: Callable[[Checkpoint], Path]) -> None:
        """Copy the run's state now, and save the copy in the thread. Waits for the checkpoint before this one first.

        Raises RunError if that one could not be written.
        """
        started = time.perf_counter()
        try:
            self.wait()
            captured = copy(self._host)
            self._step, self._writing = captured.step, self._pool.submit(save, captured)
        finally:
            self.waited += time.perf_counter() - started

    def check(self) -> None:
        """Raise RunError if a checkpoint could not be written, as far as is known by now."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises RunError, once, if the last checkpoint could not be."""
        writing, self._writing = self._writing, None
        try:
            if writing:
                writing.result()
        except RunError:  # it says already what there is to say
            raise
        except Exception as error:
            text = f"the checkpoint of step {self._step} could not be written: {first_line(error)}"
            raise RunError(f"{text}; the checkpoints before it stay") from error

    def close(self) -> None:
        """Let what is being written be finished, at the end of a run that may have failed: an error is only told."""
        try:
            self.wait()
        except RunError as error:
            log.warning("%s", error)
        self._pool.shutdown()
