"""Spikes: steps whose loss or gradient is far above what is usual in the run, and which are not applied if so asked.

Usual is the median of the last steps. Steps that were not applied are among these, so one spike moves nothing, while a
level that stays is the usual one after half as many steps: a run cannot skip for ever.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

WINDOW = 64  # steps whose median is the usual level
LEAST = 16  # steps before anything is called a spike


class Spikes:
    """Judges each step by those before it. factor: how many times the usual level is a spike."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def judge(self, loss: float, grad_norm: float) -> bool:
        """Whether this step, whose numbers are finite, is a spike; it then counts among the last steps.

        A loss can be called high only where the usual one is above 0, which not every objective's is.
        """
        high = [self._is_high(value, seen) for value, seen in ((loss, self._losses), (grad_norm, self._norms))]
        self._losses.append(loss)
        self._norms.append(grad_norm)
        return any(high)

    def state(self) -> dict[str, Any]:
        """The last steps' numbers, for JSON, which keeps every bit of them."""
        return {"losses": list(self._losses), "norms": list(self._norms)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take `state` back."""
        for numbers, kept in ((self._losses, state["losses"]), (self._norms, state["norms"])):
            numbers.clear()
            numbers.extend(kept)

    def _is_high(self, value: float, seen: deque[float]) -> bool:
        return len(seen) >= LEAST and 0 < self._factor * median(seen) < value
