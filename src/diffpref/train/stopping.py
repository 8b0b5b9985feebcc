"""When a run is told to stop: by a signal or at the end of its time, after the same step in all processes.

While steps are taken, a signal is noted, and the loop asks for it. Elsewhere, where nothing is lost (before the first
step, during validation), it raises `Stopped` at once. The end of the time is a signal too: the system's alarm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from diffpref.errors import Stopped

NAMES = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGALRM: "--max-time"}
URGENT = (signal.SIGINT, signal.SIGTERM)  # a second one of these ends the process at once
ONE_REQUEST = 1.0  # seconds: launchers, and `timeout`, pass on a signal that the process got already


class Stop:
    """Listens for signals as a context, in the main thread only, and puts back what handled them before.

    until: the time of `time.monotonic` at which the run is to stop, if there is one.
    reached: the step whose checkpoint is complete, which the loop notes here for the message.
    """

    def __init__(self, until: float | None = None) -> None:
        self.reached: int | None = None
        self._until = until
        self._number = 0  # of the signal; 0 is none
        self._urgent: float | None = None  # when the first urgent one came
        self._at_once = True
        self._before: dict[int, Any] = {}
        self._agreeing: _Agreeing | None = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            try:
                self._listen()
            except Stopped:  # the time is over already, or a signal came at once
                self.__exit__()
                raise
        return self

    def _listen(self) -> None:
        for number in NAMES:
            before = signal.getsignal(number)
            # a shell lets what runs behind it ignore SIGINT; None is a handler that is not Python's
            heard = before not in (signal.SIG_IGN, None)
            ours = self._until is not None if number == signal.SIGALRM else heard
            if ours:
                self._before[number] = before
                signal.signal(number, self._told)
        if self._until is not None:
            signal.setitimer(signal.ITIMER_REAL, max(self._until - time.monotonic(), 1e-6))

    def __exit__(self, *_: object) -> None:
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def wanted(self) -> int:
        """The number of the signal that this process got, 0 if none."""
        return self._number

    @property
    def agreed(self) -> bool:
        """Whether all processes are to stop after the step that is being taken, or was taken last."""
        if self._agreeing:
            self._number = self._agreeing.found() or self._number
            return self._agreeing.found() > 0
        return self._number > 0

    def among(self, accelerator: Any) -> None:
        """From now on agree with the other processes, if there are any."""
        self._agreeing = _Agreeing(accelerator.device) if accelerator.num_processes > 1 else None

    def ask(self) -> None:
        """Start to ask all processes, which all must call this: before each step."""
        if self._agreeing:
            self._agreeing.start(self._number)

    def hear(self, number: int) -> None:
        """Hear from the main process, all processes at once, which signal it got; 0 if none."""
        self._number = number or self._number
        if self._agreeing and number:
            self._agreeing.hear(number)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """While it lasts, signals are only noted."""
        self._at_once = False
        try:
            yield
        finally:
            self._at_once = True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A part of the former in which they raise Stopped at once, at its start if one was noted before."""
        self._at_once = True
        try:
            if self._number:
                raise self.stopped()
            yield
        finally:
            self._at_once = False

    def stopped(self) -> Stopped:
        """The exception that ends the run in order; `cli` adds how to go on."""
        when = "while starting" if self.reached is None else f"after step {self.reached}, whose checkpoint is complete"
        code = 0 if self._number == signal.SIGALRM else 128 + self._number
        return Stopped(f"stopped by {NAMES[signal.Signals(self._number)]} {when}", code)

    def _told(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in URGENT:
            if self._urgent is not None and now - self._urgent > ONE_REQUEST:
                _die(number)
            self._urgent = self._urgent or now
        first, self._number = self._number == 0, self._number or number
        if self._at_once:
            self._at_once = False  # whatever is cleaned up now is not to be cut again
            raise self.stopped()
        if first and os.environ.get("RANK", "0") == "0":
            _say(
                f"diffpref: {NAMES[signal.Signals(number)]}: stopping after this step; a second signal stops at once\n"
            )


class _Agreeing:
    """One small number a step between all processes; a GPU is not waited for, but for what it did a step ago."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.zeros(1, pin_memory=device.type == "cuda")
        self._arrived: torch.cuda.Event | None = None

    def start(self, number: int) -> None:
        flag = torch.full((1,), float(number), device=self._device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        self._host.copy_(flag, non_blocking=True)
        if self._device.type == "cuda":
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record(torch.cuda.current_stream(self._device))

    def hear(self, number: int) -> None:
        self.found()
        self._host.fill_(number)

    def found(self) -> int:
        if self._arrived:
            self._arrived.synchronize()
        return int(self._host)


def _die(number: int) -> None:
    if sys.stderr.isatty():
        _say("\x1b[?25h")  # a progress bar hides the cursor
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _say(text: str) -> None:
    os.write(2, text.encode())  # a handler may stand within a write of Python's own
