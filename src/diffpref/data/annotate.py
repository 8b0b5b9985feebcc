"""Datasets from datasets: only the best images, or paired with a model's own images.

Each streams from the old folder into a new one, which is written whole or not at all and tells in its `dataset.json`
what it was made from and how.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import BadImage, decode
from diffpref.data.making import Making, making, whole_already
from diffpref.data.schema import DatasetSummary, ImageRow, PairRow, Row, Side, score_column
from diffpref.errors import UserError, nearest
from diffpref.progress import track


def select_top(
    dataset: PreferenceDataset,
    output: Path,
    scorer: str,
    top: int,
    per_prompt: int = 0,
    overwrite: bool = False,
    pairs: bool = False,
) -> DatasetSummary:
    """The `top` images with the highest scores in the columns of that scorer, as single images.

    pairs: pairs instead, whole, by the scores of their preferred images; ties have none and are left out.
    An image counts once with a prompt, as in Diffusion-DRO's choice of experts (basiclab/DiffusionDRO,
    tools/pickapic.py), which also takes the best of all and not of each prompt; `per_prompt` above 0 takes at most so
    many of a prompt. Of equal scores the earlier row's image comes first. Raises UserError where there are no scores.
    """
    if pairs and dataset.kind != "pairs":
        raise UserError(f"--pairs: {dataset.path} holds single images; leave --pairs out")
    columns = columns_of(dataset, scorer)
    options: dict[str, str | float] = {"scorer": scorer, "top": top, "of": "pairs" if pairs else "images"}
    if per_prompt:
        options["per_prompt"] = per_prompt
    if not overwrite and (whole := whole_already(dataset, output, "select", options)):
        return whole
    scores = np.stack([dataset.numbers[column] for column in columns], axis=1)  # of each row and side
    units, ties = scores.size, 0
    if pairs:
        preferred = np.stack([dataset.labels > 0.5, dataset.labels < 0.5], axis=1)
        scores = np.where(preferred, scores, np.nan)
        units, ties = len(dataset), int((dataset.labels == 0.5).sum())
    scores = scores.ravel()  # of row r, side s: 2 r + s
    scored = np.flatnonzero(np.isfinite(scores))
    order = scored[np.argsort(-scores[scored], kind="stable")]
    chosen, duplicates, surplus = _first_different(dataset, order, top, per_prompt)
    if len(chosen) < top:
        print(f"diffpref: warning: there are only {len(chosen)} different images with a score", file=sys.stderr)
    names = dataset.score_columns()
    if not pairs:
        names = list(dict.fromkeys(map(_of_one_image, names)))
    with making(dataset, output, "select", options, "pairs" if pairs else "images", names, overwrite) as made:
        for row in _whole(dataset, chosen) if pairs else _singles(dataset, chosen):
            made.keep(row)
        made.read = units
        if chosen:
            made.outcome["lowest_score"] = float(scores[sorted(chosen)].min())
        made.dropped["lower score"] = len(order) - len(chosen) - duplicates - surplus
        made.dropped["same image and prompt"] = duplicates
        made.dropped["enough of its prompt"] = surplus
        made.dropped["tie"] = ties
        made.dropped["without a score"] = units - ties - len(scored)
    return made.summary()


def _whole(dataset: PreferenceDataset, chosen: set[int]) -> Iterator[Row]:
    rows = {place // len(dataset.sides) for place in chosen}
    return (row for number, row in enumerate(dataset.rows()) if number in rows)


def _singles(dataset: PreferenceDataset, chosen: set[int]) -> Iterator[Row]:
    sides = len(dataset.sides)
    for row, side, content in dataset.iter_images({place // sides for place in chosen}):
        if row * sides + dataset.sides.index(side) in chosen:
            yield single_image(dataset, row, side, content)


def columns_of(dataset: PreferenceDataset, scorer: str) -> list[str]:
    """The columns of a scorer's scores, one a side. Raises UserError with the nearest one where there are none."""
    columns = [score_column(side, scorer) for side in dataset.sides]
    for column in columns:
        if column not in dataset.numbers:
            known = dataset.score_columns()
            advice = nearest(column, known) if known else "it holds no scores; `diffpref data label` writes them"
            raise UserError(f"{dataset.path} has no column {column!r}: {advice}")
    return columns


def pair_with_generated(
    dataset: PreferenceDataset, generated: Sequence[tuple[str, Path]], output: Path, overwrite: bool = False
) -> DatasetSummary:
    """Pairs of an expert image, chosen, and an image that a model drew for the same prompt, rejected (SPIN).

    dataset: single images, of which disliked ones are left out, or pairs, of which the likelier winner is the expert.
    generated: prompts with the files drawn for them; the experts of a prompt take its files in turn.
    Raises UserError as `caption_dataset`, and where no prompt has both.
    """
    files: dict[str, list[Path]] = {}
    for prompt, file in generated:
        files.setdefault(prompt, []).append(file)
    taken: Counter[str] = Counter()
    with making(dataset, output, "pairs", {}, "pairs", (), overwrite) as made:
        for number, row in enumerate(track(dataset.rows(), "pairs", len(dataset), "rows")):
            side = _preferred(row)
            if side is None:
                made.drop(number, "without a liked image")
            elif row.prompt not in files:
                made.drop(number, "no generated image")
            else:
                file = files[row.prompt][taken[row.prompt] % len(files[row.prompt])]
                taken[row.prompt] += 1
                _keep_pair(made, number, row, side, file)
        unused = sum(max(0, len(found) - taken[prompt]) for prompt, found in files.items())
        made.missing.update({"expert of a generated image": unused} if unused else {})
    return made.summary()


def _first_different(
    dataset: PreferenceDataset, order: np.ndarray, top: int, per_prompt: int
) -> tuple[set[int], int, int]:
    """The first `top` places of `order` with different images or prompts, at most `per_prompt` of a prompt.

    And how many places came between: of an image and prompt that were there, and of prompts that had enough.
    """
    looked, sides = top, len(dataset.sides)
    while True:
        places = [int(place) for place in order[:looked]]
        content = {
            row * sides + dataset.sides.index(side): hashlib.sha256(data).digest()
            for row, side, data in dataset.iter_images({place // sides for place in places})
        }
        seen: dict[tuple[bytes, str], int] = {}
        of_prompt: Counter[str] = Counter()
        duplicates = surplus = 0
        for place in places:
            prompt = dataset.prompts[place // sides]
            key = content[place], prompt
            if len(seen) == top:
                break
            if key in seen:
                duplicates += 1
            elif per_prompt and of_prompt[prompt] == per_prompt:
                surplus += 1
            else:
                seen[key] = place
                of_prompt[prompt] += 1
        if len(seen) == top or looked >= len(order):
            return set(seen.values()), duplicates, surplus
        looked *= 2


def single_image(dataset: PreferenceDataset, row: int, side: Side, content: bytes) -> ImageRow:
    """One image of a row by itself, with what the light columns tell of it. A pair's label is not the image's."""
    texts = {end: dataset.texts.get(f"{side}_{end}", [None] * len(dataset))[row] for end in ("prompt", "id", "model")}
    label = float(dataset.labels[row])
    mine = score_column(side, "")
    scores = {_of_one_image(n): float(v[row]) for n, v in dataset.numbers.items() if n.startswith(mine)}
    return ImageRow(
        id=dataset.ids[row] if side == "image" else f"{dataset.ids[row]}-{side}",
        prompt=dataset.prompts[row],
        image=content,
        image_prompt=texts["prompt"],
        label=label if side == "image" and not math.isnan(label) else None,
        image_id=texts["id"],
        image_model=texts["model"],
        scores={name: score if math.isfinite(score) else None for name, score in scores.items()},
    )


def _of_one_image(column: str) -> str:
    """The column of single images that holds what a column of pairs' scores does."""
    return column.removeprefix("chosen_").removeprefix("rejected_")


def _preferred(row: Row) -> Side | None:
    """The side of a row that people like; None where they do not, or cannot tell."""
    if isinstance(row, ImageRow):
        return "image" if row.label is None or row.label > 0.5 else None
    return None if row.label == 0.5 else "chosen" if row.label > 0.5 else "rejected"


def _keep_pair(made: Making, number: int, row: Row, side: Side, file: Path) -> None:
    try:
        drawn = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    expert: bytes = getattr(row, side)
    for name, content in (("expert", expert), ("generated", drawn)):
        try:
            decode(content)
        except BadImage as error:
            made.drop_bad(number, f"image_{error.reason}", f"the {name} image: {error}")
            return
    pair = PairRow(
        id=row.id,
        prompt=row.prompt,
        chosen=expert,
        rejected=drawn,
        chosen_prompt=getattr(row, f"{side}_prompt"),
        weight=row.weight,
        chosen_id=getattr(row, f"{side}_id"),
        rejected_id=file.name,
        chosen_model=getattr(row, f"{side}_model"),
        source=row.source,
        group_id=row.group_id,
        annotator_id=row.annotator_id,
    )
    made.keep(pair)
