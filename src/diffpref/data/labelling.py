"""AI feedback: scores of every image by any number of scorers, and new labels of pairs from what they say together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.engine import (
    Answers,
    Asked,
    Once,
    Refusal,
    Running,
    Said,
    Say,
    Stage,
    ask,
    image_questions,
    is_main,
    ledger_of,
    own_device,
)
from diffpref.data.making import Making, making, whole_already
from diffpref.data.rules import Rule, Verdicts, verdicts
from diffpref.data.schema import DatasetSummary, score_column
from diffpref.errors import UserError
from diffpref.scorers.base import Scorer, UnscorableError, load_scorer

LoadScorer = Callable[[], Scorer]


def scorers_named(names: str, device: str) -> list[LoadScorer]:
    """What loads the scorers of a list with commas; several workers or ranks on "cuda" take a device each."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError("--scorer names no scorer")
    return [partial(_load_here, name, device) for name in wanted]


def label_dataset(
    dataset: PreferenceDataset,
    output: Path,
    scorers: Sequence[LoadScorer],
    rule: Rule | None = None,
    running: Running | None = None,
    overwrite: bool = False,
) -> DatasetSummary | None:
    """The dataset with each scorer's score of every image for its row's prompt: columns named as `score_column` says.

    A score is null where the scorer cannot tell. With a rule (`rules.verdicts`) pairs get new labels and margins, and
    those that it gives none are left out. Scores come from the ledger as far as it has them. None on ranks above 0.
    Raises UserError where `output` is taken, over 5% of the rows have broken images, or a scorer can tell of none.
    """
    running = running or Running()
    if rule and dataset.kind != "pairs":
        raise UserError(f"--rule: {dataset.path} holds single images, and a rule labels pairs; `data pairs` makes them")
    stages, columns, options = [], [], {"scorer": "", "version": ""}
    for load in map(Once, scorers):
        scorer = load()
        stages.append(score_stage(load))
        columns.append([score_column(side, scorer.name) for side in dataset.sides])
        for key, value in (("scorer", scorer.name), ("version", scorer.version)):
            options[key] = f"{options[key]},{value}".removeprefix(",")
    if len({names[0] for names in columns}) < len(columns):
        raise UserError(f"--scorer: two scorers of one name ({options['scorer']}) would write one column")
    made_with: dict[str, str | float] = {**options, **({"rule": rule} if rule else {})}
    if not overwrite and (whole := whole_already(dataset, output, "label", made_with)):
        return whole if is_main() else None
    if not is_main():
        _ask_all(dataset, stages, running)
        return None
    known = list(dict.fromkeys([*dataset.score_columns(), *(name for names in columns for name in names)]))
    with making(dataset, output, "label", made_with, dataset.kind, known, overwrite) as made:
        answers = [each for each in _ask_all(dataset, stages, running) if each is not None]
        for stage, each in zip(stages, answers, strict=True):
            _refuse_silence(stage, each, dataset)
        _write(made, answers, columns, rule)
    return made.summary()


def score_stage(load: Once[Scorer]) -> Stage:
    """The stage of a scorer."""
    scorer = load()
    if not re.fullmatch(r"[\w.-]+", scorer.name):
        raise UserError(f"the scorer's name {scorer.name!r} must be of letters, digits, '-', '_' and '.'")
    identity: dict[str, str | float] = {"scorer": scorer.name, "version": scorer.version}
    return Stage(f"score-{scorer.name}", identity, partial(_say_of, load), "number")


def _load_here(name: str, device: str) -> Scorer:
    return load_scorer(name, own_device(device))


def _say_of(load: Once[Scorer]) -> Say:
    return partial(_scores, load())


def _scores(scorer: Scorer, asked: list[Asked]) -> list[Said]:
    """A score for each image, or why it has none; a score that is no number counts as none."""
    found: list[Said] = [None] * len(asked)
    left = list(range(len(asked)))
    while left:
        images = [image for place in left if (image := asked[place].image) is not None]
        try:
            values = scorer(images, [asked[place].text for place in left])
        except UnscorableError as error:
            found[left.pop(error.place)] = Refusal(str(error))
            continue
        for place, value in zip(left, values, strict=True):
            found[place] = float(value) if math.isfinite(value) else None
        break
    return found


def _ask_all(dataset: PreferenceDataset, stages: list[Stage], running: Running) -> list[Answers | None]:
    ledger = ledger_of(dataset.path, running.ledger)
    return [ask(stage, image_questions(dataset, ledger), dataset, ledger, running) for stage in stages]


def _refuse_silence(stage: Stage, answers: Answers, dataset: PreferenceDataset) -> None:
    """Raise UserError where a scorer refused images and scored none."""
    said = [answers[place] for place in range(len(answers))]
    refused = next((each.why for each in said if each.why and not each.broken), None)
    if refused and all(each.value is None for each in said):
        raise UserError(f"{stage.identity['scorer']} can score no image of {dataset.path}: {refused}")


def _write(made: Making, answers: list[Answers], columns: list[list[str]], rule: Rule | None) -> None:
    """Every row whose images can be read, with its scores, and with the rule's label and margin if there is one."""
    labels = made.dataset.labels
    judged = _judged(answers, len(labels), rule) if rule else None
    changed = 0
    for number, row, said in made.answered(answers):
        if judged and judged.reasons[number]:
            made.drop(number, judged.reasons[number])
            continue
        values = {
            name: _number(answer.value)
            for of_one, names in zip(said, columns, strict=True)
            for name, answer in zip(names, of_one, strict=True)
        }
        made.missing.update(name for name, score in values.items() if score is None)
        new = replace(row, scores=row.scores | values)
        if judged:
            label = float(judged.labels[number])
            changed += np.sign(label - 0.5) != np.sign(labels[number] - 0.5)
            new = replace(new, label=label, margin=float(judged.margins[number]))
        made.keep(new)
    if judged:
        made.outcome["labels_changed"] = int(changed)
        for names, scale in zip(columns, judged.scales, strict=True):
            made.outcome[names[0].replace("chosen_score_", "scale_")] = float(scale)


def _judged(answers: list[Answers], rows: int, rule: Rule) -> Verdicts:
    scores = np.array([[_number(each[place].value) for place in range(2 * rows)] for each in answers], np.float64)
    return verdicts((scores[:, 0::2] - scores[:, 1::2]).T, rule)


def _number(value: float | str | None) -> float | None:
    return float(value) if isinstance(value, float) else None
