"""What an evaluation found, beside what was published: as records, as a table of texts, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diffpref.evaluate.protocols import Protocol
from diffpref.evaluate.score import Scores
from diffpref.evaluate.statistics import standard_error

HEADER = ("scorer", "model", "base", "delta", "SD1.5", "model - SD1.5", "DPO", "model - DPO", "DPO - SD1.5", "d. delta")
LEGEND = (
    "model, base: mean ± standard error by prompt. delta: model - base, paired by prompt and seed. SD1.5, DPO: the "
    "published means. d. delta: delta - (DPO - SD1.5)."
)


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error with the prompt as the unit; None for a single prompt."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Row:
    """One scorer's line. base, delta: None without a base model. published, source: None where nothing is known."""

    scorer: str
    version: str
    model: Mean | None
    base: Mean | None
    delta: Mean | None
    images: int
    prompts: int
    published_base: float | None
    published_tuned: float | None
    source: str | None

    @property
    def over_base(self) -> float | None:
        """How far the model's mean is above the published one of SD1.5."""
        return _minus(self.model and self.model.value, self.published_base)

    @property
    def over_tuned(self) -> float | None:
        """How far the model's mean is above the published one of Diffusion-DPO."""
        return _minus(self.model and self.model.value, self.published_tuned)

    @property
    def published_delta(self) -> float | None:
        """What Diffusion-DPO adds to SD1.5 in the publication."""
        return _minus(self.published_tuned, self.published_base)

    @property
    def over_delta(self) -> float | None:
        """How far the delta over the base model is above the published one."""
        return _minus(self.delta and self.delta.value, self.published_delta)

    def told(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        names = ("over_base", "over_tuned", "published_delta", "over_delta")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


def row_of(protocol: Protocol, model: Scores, base: Scores | None) -> Row:
    """A scorer's line, from the scores of the model's images and of the base's, which are of the same prompts."""
    prompts, values = model.target.prompts, np.array(model.values)
    below = np.array(base.values) if base else np.full(len(values), np.nan)
    figure = protocol.figure(model.scorer)
    known = np.isfinite(values)
    return Row(
        scorer=model.scorer,
        version=model.version,
        model=_mean(values, prompts),
        base=_mean(below, prompts),
        delta=_mean(values - below, prompts),
        images=int(known.sum()),
        prompts=len({prompt for prompt, there in zip(prompts, known, strict=True) if there}),
        published_base=figure.base if figure else None,
        published_tuned=figure.tuned if figure else None,
        source=figure.source if figure else None,
    )


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The lines as texts, below HEADER; columns of which no line has anything are left out."""
    lines: list[tuple[str, ...]] = [HEADER]
    for row in rows:
        published = (row.published_base, row.over_base, row.published_tuned, row.over_tuned)
        texts = [_plain(published[0]), _signed(published[1]), _plain(published[2]), _signed(published[3])]
        means = [_with_error(row.model), _with_error(row.base), _with_error(row.delta, signed=True)]
        lines.append((row.scorer, *means, *texts, _signed(row.published_delta), _signed(row.over_delta)))
    used = [place for place in range(len(HEADER)) if any(line[place] for line in lines[1:])]
    return [tuple(line[place] for place in used) for line in lines]


def markdown(title: str, rows: Sequence[Row], told: Sequence[str]) -> str:
    """A page with the table, and what is to be known of it in a list."""
    header, *lines = ([cell.replace("|", "\\|") for cell in line] for line in cells(rows))
    table = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    body = "\n".join(f"| {' | '.join(line)} |" for line in table)
    listed = "\n".join(f"- {line}" for line in told)
    return f"# {title}\n\n{body}\n\n{LEGEND}\n\n{listed}\n"


def _mean(values: np.ndarray, prompts: Sequence[str]) -> Mean | None:
    known = np.isfinite(values)
    if not known.any():
        return None
    of = [prompt for prompt, there in zip(prompts, known, strict=True) if there]
    return Mean(float(values[known].mean()), standard_error(values[known], of))


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def _with_error(mean: Mean | None, signed: bool = False) -> str:
    if mean is None:
        return ""
    text = _signed(mean.value) if signed else _plain(mean.value)
    return text if mean.error is None else f"{text} ± {mean.error:.4f}"
