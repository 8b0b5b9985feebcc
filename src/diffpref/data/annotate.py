"""Datasets from datasets: with captions, with scores, only the best images, or paired with a model's own images.

Each streams from the old folder into a new one, which is written whole or not at all and tells in its `dataset.json`
what it was made from and how.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from diffpref.captioners.base import Captioner, NoCaption
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import BadImage, decode
from diffpref.data.making import Making, making
from diffpref.data.schema import SIDES, DatasetSummary, ImageRow, PairRow, Row, Side, score_column
from diffpref.data.threads import groups, map_in_order
from diffpref.errors import UserError, nearest
from diffpref.progress import Bar, track
from diffpref.scorers.base import Scorer, UnscorableError

BATCH = 32  # rows that a captioner or scorer sees at once
Said = float | str | UnscorableError | None


def caption_dataset(
    dataset: PreferenceDataset,
    output: Path,
    captioner: Captioner,
    options: dict[str, str | float],
    overwrite: bool = False,
) -> DatasetSummary:
    """The dataset with a caption of its own for every image, in `chosen_prompt, rejected_prompt` or `image_prompt`.

    Captions that were there are replaced. Raises UserError where `output` is taken or over 5% of the rows have broken
    images, which are left out.
    """
    columns = {side: f"{side}_prompt" for side in dataset.sides}

    def say(images: list[Image.Image], prompts: list[str]) -> list[Said]:
        said = captioner(images, prompts, [0] * len(images))
        return [None if isinstance(caption, NoCaption) else caption for caption in said]

    with making(dataset, output, "caption", options, dataset.kind, dataset.score_columns(), overwrite) as made:
        for row, values in _said(made, say):
            made.keep(replace(row, **{columns[side]: value for side, value in values.items()}))
            made.missing.update(columns[side] for side, value in values.items() if value is None)
    return made.summary()


def label_dataset(dataset: PreferenceDataset, output: Path, scorer: Scorer, overwrite: bool = False) -> DatasetSummary:
    """The dataset with a scorer's score of every image for its row's prompt: columns named as `score_column` says.

    A score is null where the scorer cannot tell. Raises UserError as `caption_dataset`, and where it can tell of none.
    """
    columns = {side: score_column(side, scorer.name) for side in dataset.sides}
    options: dict[str, str | float] = {"scorer": scorer.name, "version": scorer.version}
    refused: list[UnscorableError] = []
    known = list(dict.fromkeys([*dataset.score_columns(), *columns.values()]))
    with making(dataset, output, "label", options, dataset.kind, known, overwrite) as made:
        for row, values in _said(made, lambda images, prompts: _scores(scorer, images, prompts)):
            refused += [value for value in values.values() if isinstance(value, UnscorableError)][: 1 - len(refused)]
            scores = {columns[side]: value if isinstance(value, float) else None for side, value in values.items()}
            made.missing.update(column for column, score in scores.items() if score is None)
            made.keep(replace(row, scores=row.scores | scores))
        if refused and made.missing.total() == made.kept * len(columns):
            raise UserError(f"{scorer.name} can score no image of {dataset.path}: {refused[0]}")
    return made.summary()


def select_top(
    dataset: PreferenceDataset, output: Path, scorer: str, top: int, overwrite: bool = False
) -> DatasetSummary:
    """The `top` images with the highest scores in the columns of that scorer, as single images.

    An image counts once with a prompt, as in Diffusion-DRO's choice of experts (basiclab/DiffusionDRO,
    tools/pickapic.py), which also takes the best of all and not of each prompt. Of equal scores the earlier row's
    image comes first. Raises UserError where there are no such scores.
    """
    columns = [score_column(side, scorer) for side in dataset.sides]
    for column in columns:
        if column not in dataset.numbers:
            known = dataset.score_columns()
            advice = nearest(column, known) if known else "it holds no scores; `diffpref data label` writes them"
            raise UserError(f"{dataset.path} has no column {column!r}: {advice}")
    scores = np.stack([dataset.numbers[column] for column in columns], axis=1).ravel()  # of row r, side s: 2 r + s
    scored = np.flatnonzero(np.isfinite(scores))
    order = scored[np.argsort(-scores[scored], kind="stable")]
    chosen, duplicates = _first_different(dataset, order, top)
    if len(chosen) < top:
        print(f"diffpref: warning: there are only {len(chosen)} different images with a score", file=sys.stderr)
    names = dict.fromkeys(_of_one_image(name) for name in dataset.score_columns())
    options: dict[str, str | float] = {"scorer": scorer, "top": top}
    if chosen:
        options["lowest_score"] = float(scores[sorted(chosen)].min())
    with making(dataset, output, "select", options, "images", list(names), overwrite) as made:
        for row, side, content in dataset.iter_images({place // len(columns) for place in chosen}):
            if row * len(columns) + dataset.sides.index(side) in chosen:
                made.keep(_single(dataset, row, side, content))
        made.read = len(scores)
        made.dropped["lower score"] = len(order) - len(chosen) - duplicates
        made.dropped["same image and prompt"] = duplicates
        made.dropped["without a score"] = len(scores) - len(scored)
    return made.summary()


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


def _said(
    made: Making, say: Callable[[list[Image.Image], list[str]], Sequence[Said]]
) -> Iterator[tuple[Row, dict[Side, Said]]]:
    """Every row whose images can be read, with what is said of each of them."""
    sides = made.dataset.sides
    with Bar(made.source, len(made.dataset), "rows") as bar:
        for group in groups(enumerate(map_in_order(_decoded, made.dataset.rows())), BATCH):
            shown: list[tuple[Row, list[Image.Image]]] = []
            for number, (row, images) in group:
                broken = next((image for image in images if isinstance(image, BadImage)), None)
                if broken is not None:
                    made.drop_bad(number, f"image_{broken.reason}", str(broken))
                else:
                    shown.append((row, [image for image in images if isinstance(image, Image.Image)]))
            said = say(
                [image for _, images in shown for image in images], [row.prompt for row, _ in shown for _ in sides]
            )
            for place, (row, _) in enumerate(shown):
                first = place * len(sides)
                yield row, dict(zip(sides, said[first : first + len(sides)], strict=True))
            bar.advance(len(group))


def _decoded(row: Row) -> tuple[Row, list[Image.Image | BadImage]]:
    sides = SIDES["pairs" if isinstance(row, PairRow) else "images"]
    return row, [_image(getattr(row, side)) for side in sides]


def _image(content: bytes) -> Image.Image | BadImage:
    try:
        return decode(content)
    except BadImage as error:
        return error


def _scores(scorer: Scorer, images: list[Image.Image], prompts: list[str]) -> list[Said]:
    """A score for each image, or why it has none; a score that is no number counts as none."""
    found: list[Said] = [None] * len(images)
    asked = list(range(len(images)))
    while asked:
        try:
            values = scorer([images[place] for place in asked], [prompts[place] for place in asked])
        except UnscorableError as error:
            found[asked.pop(error.place)] = error
            continue
        for place, value in zip(asked, values, strict=True):
            found[place] = float(value) if math.isfinite(value) else None
        break
    return found


def _first_different(dataset: PreferenceDataset, order: np.ndarray, top: int) -> tuple[set[int], int]:
    """The first places of `order` with different images or prompts, `top` of them, and how many others came between."""
    looked, sides = top, len(dataset.sides)
    while True:
        places = [int(place) for place in order[:looked]]
        content = {
            row * sides + dataset.sides.index(side): hashlib.sha256(data).digest()
            for row, side, data in dataset.iter_images({place // sides for place in places})
        }
        seen: dict[tuple[bytes, str], int] = {}
        duplicates = 0
        for place in places:
            if len(seen) < top:
                key = content[place], dataset.prompts[place // sides]
                duplicates += key in seen
                seen.setdefault(key, place)
        if len(seen) == top or looked >= len(order):
            return set(seen.values()), duplicates
        looked *= 2


def _single(dataset: PreferenceDataset, row: int, side: Side, content: bytes) -> ImageRow:
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
