"""Compare folders of images with a base folder, pair by pair: the same prompt, place among its images and seed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffpref.errors import UserError, nearest
from diffpref.evaluate.alarms import LARGEST_FALL, Alarm, diversity_alarms, held_out_alarms
from diffpref.evaluate.combining import Combination, combine
from diffpref.evaluate.features import Features, features_of
from diffpref.evaluate.pairing import Place, of_categories, pair, short_names
from diffpref.evaluate.results import Combined, Named, Result, corrected, results_of
from diffpref.evaluate.score import all_scores_of
from diffpref.evaluate.spread import Spread, spread
from diffpref.scorers.base import Scorer


@dataclass(frozen=True)
class Comparison:
    """Folders against the first of them, the base, by each scorer.

    `values` are the scores, (scorers, folders, places). `results` are over all prompts, for each folder by each scorer;
    `by_category` are over those of each category. `spreads` has one entry for each folder but the base, or none where
    no features were asked for.
    """

    folders: tuple[Path, ...]
    names: tuple[str, ...]
    scorers: tuple[str, ...]
    places: tuple[Place, ...]
    values: np.ndarray = field(repr=False)
    results: tuple[Result, ...]
    by_category: tuple[Result, ...]
    spreads: tuple[Spread, ...]
    alarms: tuple[Alarm, ...]

    def differences(self, folder: int = 1, scorer: int = 0) -> np.ndarray:
        """How much higher a folder's score is than the base's at each place, (places,)."""
        return self.values[scorer, folder] - self.values[scorer, 0]

    def summaries(self) -> list[dict[str, object]]:
        """Each result over all prompts, with its categories and its folder's spread and alarms, ready for JSON."""
        spreads = {folder: each.summary() for folder, each in zip(self.folders[1:], self.spreads, strict=False)}
        return [
            {
                **result.summary(),
                "categories": [
                    each.summary()
                    for each in self.by_category
                    if (each.folder_b, each.scorer) == (result.folder_b, result.scorer)
                ],
                "spread": spreads.get(result.folder_b),
                "alarms": [alarm.summary() for alarm in self.alarms if alarm.folder == result.folder_b],
            }
            for result in self.results
        ]


def compare(
    folders: Sequence[Path],
    scorers: Sequence[Scorer],
    features: Features | None = None,
    *,
    optimised: str | None = None,
    categories: Sequence[str] = (),
    largest_fall: float = LARGEST_FALL,
    combination: Combination | None = None,
) -> Comparison:
    """Compare each further folder with the first; a folder that is not scored yet is scored first.

    features: what diversity and drift are measured by. optimised: the scorer that the training aimed at, by which the
    others are held out; the first if not given. categories: compare on prompts of these alone. largest_fall: the share
    of its diversity that a folder may lose without an alarm. combination: of the scorers, over the images of all
    folders, as one more scorer; it rings no alarm.
    Raises UserError where the folders do not hold the same prompts, images and seeds.
    """
    names, kinds = short_names(folders), [scorer.name for scorer in scorers]
    for name in kinds:
        if kinds.count(name) > 1:
            raise UserError(f"--scorer: two scorers of one name ({name}) would share a file of scores")
    if optimised is not None and optimised not in kinds:
        raise UserError(f"--optimised {optimised}: no such scorer here: {nearest(optimised, kinds)}")
    places = of_categories(pair(folders), categories)
    values = np.stack([_scores(folder, scorers, places) for folder in folders], axis=1)
    measures: list[Named] = list(scorers)
    if combination is not None:
        measures.append(Combined(combination.name, "+".join(scorer.version for scorer in scorers)))
        values = np.concatenate([values, _combined(combination, kinds, values, places)])
    over_all = results_of(folders, measures, places, values)
    known = sorted({place.category for place in places if place.category is not None})
    if all(place.category == places[0].category for place in places):
        known = []  # it would say the same again
    of_each = [result for name in known for result in results_of(folders, measures, places, values, name)]
    by_category = sorted(of_each, key=lambda result: folders.index(result.folder_b))
    together = corrected([*over_all, *by_category])
    results, by_category = together[: len(over_all)], together[len(over_all) :]
    spreads = [] if features is None else _spreads(folders, features, places)
    alarms = []
    for place, folder in enumerate(folders[1:]):
        own = [each for each in results if each.folder_b == folder and each.scorer in kinds]
        alarms += held_out_alarms(own, optimised or kinds[0])
        alarms += diversity_alarms(folder, spreads[place], largest_fall) if spreads else []
    return Comparison(
        tuple(folders),
        tuple(names),
        tuple(measure.name for measure in measures),
        tuple(places),
        values,
        tuple(results),
        tuple(by_category),
        tuple(spreads),
        tuple(alarms),
    )


def _scores(folder: Path, scorers: Sequence[Scorer], places: Sequence[Place]) -> np.ndarray:
    """A folder's scores, (scorers, places)."""
    values = []
    for scores in all_scores_of(folder, scorers):
        found = {(image.prompt, image.index): value for image, value in zip(scores.images, scores.values, strict=True)}
        values.append([found[place.prompt, place.index] for place in places])
    return np.array(values)


def _combined(
    combination: Combination, kinds: Sequence[str], values: np.ndarray, places: Sequence[Place]
) -> np.ndarray:
    """The combined scores, (1, folders, places), of all folders' together."""
    flat = dict(zip(kinds, values.reshape(len(kinds), -1), strict=True))
    prompts = [place.prompt for place in places] * values.shape[1]
    return combine(combination, flat, prompts).reshape(1, *values.shape[1:])


def _spreads(folders: Sequence[Path], features: Features, places: Sequence[Place]) -> list[Spread]:
    prompts = [place.prompt for place in places]
    vectors = []
    for folder in folders:
        found = features_of(folder, features)
        vectors.append(np.stack([found[place.prompt, place.index] for place in places]))
    return [spread(features.name, features.version, vectors[0], other, prompts) for other in vectors[1:]]
