"""What one scorer says of a tuned folder against the base: over all prompts, or over those of one category."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from diffpref.evaluate.pairing import Place
from diffpref.evaluate.statistics import (
    benjamini_hochberg,
    bootstrap_means,
    effect_size,
    holm,
    outcomes,
    prompt_sign_test,
)

LEVEL = 0.05


@runtime_checkable
class Named(Protocol):
    """What scores are by: a scorer, or a combination of several."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...


@dataclass(frozen=True)
class Combined:
    """A combination of scorers, with their versions."""

    name: str
    version: str


@dataclass(frozen=True)
class Result:
    """How b fares against a: rates and differences are b's over a's, intervals are 95%.

    `category` is None over all prompts. `images` counts the pairs. `p_value` is the sign test's over prompts; `p_holm`
    and `p_fdr` are the same corrected for the number of results that were made together, after Holm and after Benjamini
    and Hochberg. `effect_size` is Cohen's d of the prompts' differences, None where they do not vary.
    """

    folder_a: Path
    folder_b: Path
    scorer: str
    version: str
    category: str | None
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    wins: int
    losses: int
    ties: int
    prompts: int
    images: int
    mean_a: float
    mean_b: float
    mean_difference: float
    mean_difference_low: float
    mean_difference_high: float
    p_value: float
    p_holm: float
    p_fdr: float
    effect_size: float | None

    @property
    def verdict(self) -> Literal["better", "worse", "no clear difference"]:
        """What the win rate's interval allows to say, if the corrected sign test agrees, and no more."""
        if self.p_holm >= LEVEL or self.win_rate_low <= 0.5 <= self.win_rate_high:
            return "no clear difference"
        return "better" if self.win_rate > 0.5 else "worse"

    def summary(self) -> dict[str, object]:
        """Ready for JSON."""
        found = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        return {**found, "verdict": self.verdict}


def results_of(
    folders: Sequence[Path],
    scorers: Sequence[Named],
    places: Sequence[Place],
    values: np.ndarray,
    category: str | None = None,
) -> list[Result]:
    """A result for each folder but the first and each scorer; p-values are not corrected yet.

    values: the scores, (scorers, folders, places). With a category, the places of it alone count.
    """
    rows = [row for row, place in enumerate(places) if category in (None, place.category)]
    prompts = [places[row].prompt for row in rows]
    cells = [(folder, scorer) for folder in range(1, len(folders)) for scorer in range(len(scorers))]
    scores = [(values[scorer, 0, rows], values[scorer, folder, rows]) for folder, scorer in cells]
    rates = bootstrap_means(np.stack([outcomes(a, b) for a, b in scores], axis=1), prompts)
    differences = bootstrap_means(np.stack([b - a for a, b in scores], axis=1), prompts)
    found = []
    for (folder, scorer), (a, b), rate, difference in zip(cells, scores, rates, differences, strict=True):
        p_value = prompt_sign_test(a, b, prompts)
        found.append(
            Result(
                folder_a=folders[0],
                folder_b=folders[folder],
                scorer=scorers[scorer].name,
                version=scorers[scorer].version,
                category=category,
                win_rate=rate.value,
                win_rate_low=rate.low,
                win_rate_high=rate.high,
                wins=int((b > a).sum()),
                losses=int((b < a).sum()),
                ties=int((b == a).sum()),
                prompts=len(set(prompts)),
                images=len(rows),
                mean_a=float(a.mean()),
                mean_b=float(b.mean()),
                mean_difference=difference.value,
                mean_difference_low=difference.low,
                mean_difference_high=difference.high,
                p_value=p_value,
                p_holm=p_value,
                p_fdr=p_value,
                effect_size=effect_size(a, b, prompts),
            )
        )
    return found


def corrected(results: Sequence[Result]) -> list[Result]:
    """The same results with p-values corrected for how many they are."""
    p_values = [result.p_value for result in results]
    return [
        replace(result, p_holm=of_holm, p_fdr=of_rate)
        for result, of_holm, of_rate in zip(results, holm(p_values), benjamini_hochberg(p_values), strict=True)
    ]
