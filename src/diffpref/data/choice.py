"""Which rows are trained on, which are held out, and which are left out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np

from diffpref.data.dataset import PreferenceDataset
from diffpref.draws import draw_seed, uniform
from diffpref.errors import UserError
from diffpref.train.config import DataConfig

MAX_BAD_SHARE = 0.05
NAMED = 3  # rows that a message names


@dataclass(frozen=True)
class Choice:
    """Which rows are trained on and which are held out, and how many were left out, by reason."""

    train: list[int]
    heldout: list[int]
    dropped: dict[str, int]


def choose_rows(dataset: PreferenceDataset, bad: Collection[int], data: DataConfig) -> Choice:
    """Split by prompt (`data.holdout`), leave out broken (`bad`) rows, those of `left_out` and, if so configured, ties.

    A prompt is held out when the number that its text hashes to lies below the share, so it stands on one side only,
    and adding rows moves no prompt. Raises UserError where nothing is left to train on.
    """
    train, heldout, dropped = [], [], {"unreadable": 0, "ties": 0}
    held = {prompt for prompt in set(dataset.prompts) if uniform(draw_seed(prompt), "holdout") < data.holdout}
    for row in range(len(dataset)):
        if reason := dataset.left_out.get(row):
            dropped[reason] = dropped.get(reason, 0) + 1
        elif row in bad:
            dropped["unreadable"] += 1
        elif data.ties == "drop" and dataset.labels[row] == 0.5:
            dropped["ties"] += 1
        elif dataset.prompts[row] in held:
            heldout.append(row)
        else:
            train.append(row)
    if dropped["ties"] == len(dataset):
        raise UserError(f"all {len(dataset)} {dataset.kind} are ties; train on them with --data.ties soft or random")
    if not train:
        why = ", ".join(f"{count} {reason}" for reason, count in {**dropped, "held out": len(heldout)}.items())
        raise UserError(f"no {dataset.kind.removesuffix('s')} of {len(dataset)} is left to train on: {why}")
    return Choice(train, heldout, dropped)


def with_weights(dataset: PreferenceDataset, data: DataConfig, choice: Choice) -> PreferenceDataset:
    """The dataset with `data.weighting`: each weight times the row's margin over the mean margin of training rows.

    Raises UserError where a chosen row's margin is missing or negative, or all are 0.
    """
    if data.weighting == "none":
        return dataset
    margins = dataset.numbers.get("margin")
    if margins is None or np.isnan(margins).all():
        raise UserError(f"data.weighting: {dataset.path} has no margins (column margin)")
    rows = np.array(sorted(choice.train + choice.heldout))
    wrong = rows[~(np.isfinite(margins[rows]) & (margins[rows] >= 0))]
    if len(wrong):
        raise UserError(
            f"data.weighting: the margin of {len(wrong)} of {len(rows)} rows is missing, negative or infinite: "
            f"{named(dataset, wrong.tolist())}"
        )
    mean = margins[choice.train].mean()
    if mean == 0:
        raise UserError(f"data.weighting: every margin of {dataset.path} is 0, so that nothing would be learnt")
    return replace(dataset, weights=dataset.weights * np.nan_to_num(margins) / mean)


def named(dataset: PreferenceDataset, rows: Iterable[int]) -> str:
    """The ids of the first rows."""
    names = [dataset.ids[row] for row in rows]
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def refuse_many_bad(dataset: PreferenceDataset, bad: dict[int, str], count: int) -> None:
    """Raise UserError where more than 5% of `count` rows are bad."""
    if len(bad) > MAX_BAD_SHARE * count:
        row, reason = next(iter(bad.items()))
        raise UserError(
            f"{len(bad)} of {count} rows have images that cannot be read (over {MAX_BAD_SHARE:.0%}); "
            f"the first is row {dataset.ids[row]}: {reason}"
        )
