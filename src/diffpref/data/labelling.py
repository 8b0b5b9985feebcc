"""AI feedback: scores of every image by any number of scorers, and new labels of pairs from what they say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.engine import Answers, Running, is_main, ledger_of
from diffpref.data.making import Making, making, whole_already
from diffpref.data.rules import Rule, Verdicts, verdicts
from diffpref.data.schema import DatasetSummary, score_column
from diffpref.data.scoring import LoadScorer, loaded_once, score_all
from diffpref.errors import UserError


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
    once, ledger = loaded_once(scorers), ledger_of(dataset.path, running.ledger)
    columns = [[score_column(side, load().name) for side in dataset.sides] for load in once]
    if len({names[0] for names in columns}) < len(columns):
        raise UserError(f"--scorer: two scorers would write one column: {', '.join(names[0] for names in columns)}")
    made_with: dict[str, str | float] = {
        "scorer": ",".join(load().name for load in once),
        "version": ",".join(load().version for load in once),
        **({"rule": rule} if rule else {}),
    }
    if not overwrite and (whole := whole_already(dataset, output, "label", made_with)):
        return whole if is_main() else None
    if not is_main():
        score_all(dataset, once, ledger, running)
        return None
    known = list(dict.fromkeys([*dataset.score_columns(), *(name for names in columns for name in names)]))
    with making(dataset, output, "label", made_with, dataset.kind, known, overwrite) as made:
        _write(made, score_all(dataset, once, ledger, running) or [], columns, rule)
    return made.summary()


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
