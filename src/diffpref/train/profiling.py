"""`--profile`: where a step's time goes, as a table of its regions and as a trace of torch.profiler.

The table's steps run without torch.profiler, which slows the host's side of every operation; the traced ones come after
them. On a GPU a region has two times. On the host it is what handing out the work took, or in `read` waiting for it;
on the device it is what the work took, between two events in its queue.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from diffpref.files import write_whole

log = logging.getLogger("diffpref")
Region = Callable[[str], AbstractContextManager[None]]
WARM_UP, TRACED = 3, 2  # steps


def unmeasured(name: str) -> AbstractContextManager[None]:
    """A region of a run that is not profiled."""
    return contextlib.nullcontext()


class Profiler:
    """Measures the regions of some steps of a run, and writes `folder`.

    left: how many steps the run still has; of a short run fewer are measured.
    """

    def __init__(self, folder: Path, steps: int, left: int, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._traced = min(TRACED, left)
        self._steps = min(steps, left)
        self._warm_up = max(0, min(WARM_UP, left - self._steps - self._traced))
        self._begun, self._started, self._seconds, self._written = 0, 0.0, list[float](), False
        self._host: dict[str, list[float]] = {}
        self._events: dict[str, list[tuple[Any, Any]]] = {}
        self._trace: Any = None

    @property
    def _measuring(self) -> bool:
        return 0 < self._begun - self._warm_up <= self._steps

    @contextlib.contextmanager
    def region(self, name: str) -> Iterator[None]:
        """A part of a step, which holds no other region."""
        if self._trace is not None:
            with torch.profiler.record_function(name):
                yield
            return
        if not self._measuring:
            yield
            return
        started, before = time.perf_counter(), self._event()
        yield
        self._host.setdefault(name, []).append(time.perf_counter() - started)
        if before is not None:
            self._events.setdefault(name, []).append((before, self._event()))

    def next(self) -> None:
        """Hear that a step begins; the one before has then ended."""
        self._end_step()
        self._begun += 1
        if self._measuring:
            self._started = time.perf_counter()
        measured = self._warm_up + self._steps
        if self._begun == measured + 1 and self._traced:
            self._trace = torch.profiler.profile()
            self._trace.start()
        elif self._begun > measured + self._traced:
            self.finish()

    def finish(self) -> None:
        """Write what was measured, if it is not written yet: also of a run that ends early."""
        self._end_step()
        self._begun = self._warm_up + self._steps + self._traced + 1
        if self._written or not self._seconds:
            return
        self._written = True
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._trace is not None:
            self._trace.stop()
            self._trace.export_chrome_trace(str(self._folder / "trace.json.gz"))
            self._trace = None
        found = self.table()
        write_whole(self._folder / "profile.json", (json.dumps(found, indent=1) + "\n").encode())
        write_whole(self._folder / "profile.md", markdown(found).encode())
        log.info("where a step's time went (%s):\n%s", self._folder, markdown(found))

    def table(self) -> dict[str, Any]:
        """What was measured: seconds of a step, and of each of its regions, the longest first."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        steps = len(self._seconds)
        regions = []
        for name, times in self._host.items():
            row = {"region": name, "calls": len(times) / steps, "seconds": sum(times) / steps}
            if name in self._events:
                device = sum(before.elapsed_time(after) for before, after in self._events[name]) / 1000
                row["device_seconds"] = device / steps
            regions.append(row)
        whole = sum(self._seconds) / steps
        regions.append({"region": "other", "calls": 1.0, "seconds": whole - sum(row["seconds"] for row in regions)})
        for row in regions:
            row["share"] = row["seconds"] / whole
        regions.sort(key=lambda row: -row.get("device_seconds", row["seconds"]))
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        return {"device": name, "steps": steps, "seconds_a_step": whole, "regions": regions}

    def _end_step(self) -> None:
        if self._started:
            self._seconds.append(time.perf_counter() - self._started)
            self._started = 0.0

    def _event(self) -> Any:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def markdown(found: dict[str, Any]) -> str:
    """The table for people."""
    on_device = any("device_seconds" in row for row in found["regions"])
    head = ["region", "calls a step", "ms a step", "share", *(["ms on the device"] if on_device else [])]
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    for row in found["regions"]:
        cells = [row["region"], f"{row['calls']:.1f}", f"{1000 * row['seconds']:.1f}", f"{row['share']:.1%}"]
        if on_device:
            cells.append(f"{1000 * row['device_seconds']:.1f}" if "device_seconds" in row else "")
        lines.append(" | ".join(cells))
    title = f"{found['steps']} steps of {1000 * found['seconds_a_step']:.1f} ms on {found['device']}"
    return "\n".join([title, "", *(f"| {line} |" for line in lines), ""])
