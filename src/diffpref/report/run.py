"""Read a run folder as far as the report shows it."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffpref.errors import UserError

FEW = 25  # values: a shorter series is shown as it is, a longer one as means
LAST_SHARE = 0.1  # of a long series, over which its final value is averaged: a single batch says little


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was logged; a value that is no number is NaN."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if math.isfinite(value)]

    def final(self) -> float | None:
        """Where the series ends: its last finite value, of a long series the mean of the last tenth; None if empty."""
        values = self.finite()
        if not values:
            return None
        count = 1 if len(values) < FEW else math.ceil(len(values) * LAST_SHARE)
        return sum(values[-count:]) / count

    def median(self) -> float | None:
        """The median of the finite values, None where there is none."""
        return float(np.median(self.finite())) if self.finite() else None


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds: its metrics by step, the text of its files, its newest validation images."""

    folder: Path
    metrics: list[dict[str, Any]]
    config: str | None
    environment: str | None
    samples: Path | None

    def series(self, key: str) -> Series:
        """The metric `key` over the steps; empty where the run did not log it."""
        rows = [row for row in self.metrics if key in row]
        return Series([float(row["step"]) for row in rows], [_number(row[key]) for row in rows])


def read_run(folder: Path) -> RunRecord:
    """Read a run folder; files that a run has not written yet are absent from the record.

    Raises UserError where the folder is missing or metrics.jsonl has a line that is wrong.
    """
    if not folder.is_dir():
        raise UserError(f"no such run folder: {folder}")
    return RunRecord(
        folder=folder,
        metrics=_read_metrics(folder / "metrics.jsonl"),
        config=_text(folder / "config.yaml"),
        environment=_text(folder / "environment.json"),
        samples=_newest_samples(folder / "samples"),
    )


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged objects merged by step, in order: a resumed run logs again the steps after its checkpoint."""
    lines = (_text(path) or "").split("\n")
    by_step: dict[float, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):  # a run that was killed may have left its last line unfinished
                break
            raise UserError(f"{path} line {number}: not JSON") from None
        if not isinstance(row, dict) or not math.isfinite(_number(row.get("step"))):
            raise UserError(f"{path} line {number}: not an object with a step")
        by_step.setdefault(row["step"], {}).update(row)
    return [by_step[step] for step in sorted(by_step)]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _newest_samples(folder: Path) -> Path | None:
    """The folder `step-N` of the largest N that has a list of images."""
    steps = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    whole = [path for path in steps if (path / "metadata.jsonl").is_file()]
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)
