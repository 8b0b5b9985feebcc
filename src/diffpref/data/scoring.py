"""Scorers as stages of the engine: what `data label`, `score` and evaluation share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from diffpref.data.engine import (
    Answers,
    Asked,
    Captioned,
    Once,
    Refusal,
    Running,
    Said,
    Say,
    Stage,
    ask_all,
    own_device,
)
from diffpref.data.engine.hashing import image_questions
from diffpref.errors import UserError
from diffpref.scorers.base import Precision, Prepare, Reward, Scorer, UnscorableError, identity_of, load_scorer

LoadScorer = Callable[[], Scorer]


def names_of(wanted: str) -> list[str]:
    """The scorers of a list with commas. Raises UserError where there is none."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise UserError("--scorer names no scorer")
    return names


def scorers_named(names: str, device: str, precision: Precision | None = None) -> list[LoadScorer]:
    """What loads the scorers of a list with commas; several workers or ranks on "cuda" take a device each."""
    return [partial(_load_here, name, device, precision) for name in names_of(names)]


def score_all(
    dataset: Captioned, scorers: Sequence[LoadScorer], ledger: Path, running: Running, batch: int = 32
) -> list[Answers] | None:
    """What every scorer says of every image, row by row and side by side, in one pass; None on ranks above 0.

    Scores come from the ledger as far as it has them. Raises UserError as `ask_all`, and where a scorer refused images
    and could score none.
    """
    stages = [score_stage(load if isinstance(load, Once) else Once(load), batch) for load in scorers]
    questions = image_questions(dataset, ledger, running.shown)
    answers = ask_all(stages, questions, dataset, ledger, running)
    for stage, each in zip(stages, answers or [], strict=False):
        _refuse_silence(stage, each, dataset.path)
    return answers


def loaded_once(scorers: Sequence[LoadScorer]) -> list[Once[Scorer]]:
    """The scorers, each to be loaded once. Raises UserError for two of one name: they would share what is written."""
    once = [Once(load) for load in scorers]
    names = [load().name for load in once]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--scorer: two scorers of one name ({name}) would write one column")
    return once


def score_stage(load: Once[Scorer], batch: int = 32) -> Stage:
    """The stage of a scorer."""
    scorer = load()
    if not re.fullmatch(r"[\w.-]+", scorer.name):
        raise UserError(f"the scorer's name {scorer.name!r} must be of letters, digits, '-', '_' and '.'")
    identity: dict[str, str | float] = {**identity_of(scorer)}
    return Stage(f"score-{scorer.name}", identity, partial(_say_of, load), "number", batch)


def _load_here(name: str, device: str, precision: Precision | None) -> Scorer:
    return load_scorer(name, own_device(device), precision)


def _say_of(load: Once[Scorer]) -> Say:
    scorer = load()
    return _Measuring(scorer) if isinstance(scorer, Reward) else partial(_scores, scorer)


@dataclass(frozen=True)
class _Measuring:
    """A reward model as a tool: its preparation is shared with others of the pass."""

    reward: Reward

    @property
    def prepare(self) -> Prepare:
        """What is done to each image."""
        return self.reward.prepare

    def __call__(self, asked: list[Asked]) -> list[Said]:
        def measure(some: list[Asked]) -> list[float]:
            return self.reward.measure([each.prepared for each in some], [each.text for each in some]).tolist()

        return _said(asked, measure)


def _scores(scorer: Scorer, asked: list[Asked]) -> list[Said]:
    def score(some: list[Asked]) -> list[float]:
        images = [each.image for each in some if isinstance(each.image, Image.Image)]
        return scorer(images, [each.text for each in some])

    return _said(asked, score)


def _said(asked: list[Asked], score: Callable[[list[Asked]], list[float]]) -> list[Said]:
    """A score for each image, or why it has none; a score that is no number counts as none."""
    found: list[Said] = [None] * len(asked)
    left = list(range(len(asked)))
    while left:
        try:
            values = score([asked[place] for place in left])
        except UnscorableError as error:
            found[left.pop(error.place)] = Refusal(str(error))
            continue
        for place, value in zip(left, values, strict=True):
            found[place] = float(value) if math.isfinite(value) else None
        break
    return found


def _refuse_silence(stage: Stage, answers: Answers, path: Path) -> None:
    """Raise UserError where a scorer refused images and scored none."""
    said = [answers[place] for place in range(len(answers))]
    refused = next((each.why for each in said if each.why and not each.broken), None)
    if refused and all(each.value is None for each in said):
        raise UserError(f"{stage.identity['scorer']} can score no image of {path}: {refused}")
