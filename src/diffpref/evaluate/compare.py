"""Compare two folders of images pair by pair: the same prompt, the same place among its images, the same seed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffpref.errors import UserError
from diffpref.evaluate.score import Scores, scores_of
from diffpref.evaluate.statistics import effect_size, mean_difference, prompt_sign_test, win_rate
from diffpref.scorers.base import Scorer


@dataclass(frozen=True)
class Pair:
    """The two images of one prompt and seed, with their scores."""

    prompt: str
    index: int
    seed: int | None
    file_a: Path
    file_b: Path
    score_a: float
    score_b: float

    @property
    def difference(self) -> float:
        """How much higher b's score is than a's."""
        return self.score_b - self.score_a


@dataclass(frozen=True)
class Comparison:
    """How b fares against a: rates and differences are b's over a's, intervals are 95%.

    `images` counts the pairs. `p_value` is the sign test's over prompts. `effect_size` is Cohen's d of the prompts'
    differences, None where they do not vary.
    """

    folder_a: Path
    folder_b: Path
    scorer: str
    version: str
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
    effect_size: float | None
    pairs: tuple[Pair, ...]

    def summary(self) -> dict[str, object]:
        """All but the single pairs, ready for JSON."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self).items()
            if name != "pairs"
        }


def compare(folder_a: Path, folder_b: Path, scorer: Scorer) -> Comparison:
    """Compare b with a; a folder that is not scored yet is scored first.

    Raises UserError where the folders do not hold the same prompts, images and seeds.
    """
    scores_a, scores_b = scores_of(folder_a, scorer), scores_of(folder_b, scorer)
    pairs = _pair(scores_a, scores_b)
    a = np.array([pair.score_a for pair in pairs])
    b = np.array([pair.score_b for pair in pairs])
    prompts = [pair.prompt for pair in pairs]
    rate, difference = win_rate(a, b, prompts), mean_difference(a, b, prompts)
    return Comparison(
        folder_a=folder_a,
        folder_b=folder_b,
        scorer=scorer.name,
        version=scorer.version,
        win_rate=rate.value,
        win_rate_low=rate.low,
        win_rate_high=rate.high,
        wins=int((b > a).sum()),
        losses=int((b < a).sum()),
        ties=int((b == a).sum()),
        prompts=len(set(prompts)),
        images=len(pairs),
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        mean_difference=difference.value,
        mean_difference_low=difference.low,
        mean_difference_high=difference.high,
        p_value=prompt_sign_test(a, b, prompts),
        effect_size=effect_size(a, b, prompts),
        pairs=tuple(pairs),
    )


def _pair(a: Scores, b: Scores) -> list[Pair]:
    of_a, of_b = _by_place(a), _by_place(b)
    for has, lacks, keys in ((a, b, of_a.keys() - of_b.keys()), (b, a, of_b.keys() - of_a.keys())):
        if keys:
            prompt, index = min(keys)
            of_prompt = any(image.prompt == prompt for image in lacks.images)
            missing = f"image {index} of the prompt" if of_prompt else "the prompt"
            raise UserError(
                f"the folders do not pair: {lacks.folder} lacks {missing} {prompt!r}, which {has.folder} has "
                f"({len(keys)} such image{'s' * (len(keys) > 1)})"
            )
    pairs = []
    for key, place in of_a.items():
        image_a, image_b = a.images[place], b.images[of_b[key]]
        if image_a.seed != image_b.seed:
            raise UserError(
                f"the folders do not pair: image {key[1]} of the prompt {key[0]!r} has seed {image_a.seed} in "
                f"{a.folder} and {image_b.seed} in {b.folder}"
            )
        pairs.append(
            Pair(*key, image_a.seed, image_a.file, image_b.file, a.values[place], b.values[of_b[key]]),
        )
    return pairs


def _by_place(scores: Scores) -> dict[tuple[str, int], int]:
    """The place of each image by its prompt and index, which must name one image only."""
    places: dict[tuple[str, int], int] = {}
    for place, image in enumerate(scores.images):
        if places.setdefault((image.prompt, image.index), place) != place:
            raise UserError(f"{image.where}: a second image {image.index} of the prompt {image.prompt!r}")
    return places
