"""Progress on stderr: a live bar with rate and time left on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")
LINE_EVERY = 15.0  # seconds between lines where there is no terminal


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.finished_speed or task.speed, task.fields["unit"]), style="cyan")


class Bar:
    """One task's progress. Use it as a context manager; `advance` it as items are done. Not `shown`, it is silent."""

    def __init__(self, description: str, total: int, unit: str = "items", done: int = 0, shown: bool = True) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done = self._done_before = done
        self._started = self._last_line = time.monotonic()
        self._note = ""
        self._shown = shown
        self._live: Progress | None = None
        if shown and sys.stderr.isatty():
            columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate()]
            columns += [TimeRemainingColumn(), TextColumn("{task.fields[note]}", style="dim")]
            self._live = Progress(*columns, console=Console(stderr=True))
            self._task = self._live.add_task(description, total=total, completed=done, unit=unit, note="")

    def __enter__(self) -> "Bar":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        elif self._shown and self._done > self._done_before:
            self._line()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more items as done; `note` is a short text beside the bar."""
        self._done += count
        if note is not None:
            self._note = note
        if self._live:
            self._live.update(self._task, advance=count, note=self._note)
        elif self._shown and time.monotonic() - self._last_line > LINE_EVERY:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        speed = (self._done - self._done_before) / max(self._last_line - self._started, 1e-9)
        left = (self._total - self._done) / speed if speed else 0.0
        ending = f", {left:.0f} s left" if self._done < self._total else f" in {self._last_line - self._started:.0f} s"
        text = f"{self._description}: {self._done}/{self._total}, {_rate(speed, self._unit)}{ending}"
        print(f"{text}  {self._note}".rstrip(), file=sys.stderr, flush=True)


def track(items: Iterable[T], description: str, total: int, unit: str = "items") -> Iterator[T]:
    """Yield the items under a progress bar of `total` steps."""
    with Bar(description, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


def _rate(speed: float | None, unit: str) -> str:
    if not speed:
        return f"- {unit}/s"
    return f"{speed:.1f} {unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{unit.removesuffix('s')}"
