"""Pairs of single images of the same prompt, by their scores."""

from __future__ import annotations

import hashlib
from pathlib import Path

from diffpref.data.annotate import columns_of, single_image
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import BadImage, decode
from diffpref.data.making import Making, making, whole_already
from diffpref.data.pairing import Pairing, pairs_of
from diffpref.data.schema import DatasetSummary, PairRow
from diffpref.errors import UserError
from diffpref.progress import Bar


def pair_scored(
    dataset: PreferenceDataset,
    output: Path,
    scorer: str,
    pairing: Pairing,
    min_margin: float = 0.0,
    overwrite: bool = False,
) -> DatasetSummary:
    """Pairs of a dataset's single images that have the same prompt; the higher score wins, `pairs_of` says who meets.

    An image counts once with a prompt, the first one. Prompts come in the order of their first rows. Raises UserError
    where there are no such images or scores, over 5% of the images are broken, and where no pair is left.
    """
    if dataset.kind != "images":
        raise UserError(f"--pairing: {dataset.path} holds pairs; `data select` makes single images of them")
    (column,) = columns_of(dataset, scorer)
    of_prompt: dict[str, list[int]] = {}
    for row, prompt in enumerate(dataset.prompts):
        of_prompt.setdefault(prompt, []).append(row)
    names = dataset.score_columns()
    sides = [f"{side}_{name}" for name in names for side in ("chosen", "rejected")]
    options: dict[str, str | float] = {"by": scorer, "pairing": pairing, "min_margin": min_margin}
    if not overwrite and (whole := whole_already(dataset, output, "pairs", options)):
        return whole
    with making(dataset, output, "pairs", options, "pairs", sides, overwrite) as made:
        with Bar("pairs", len(dataset), "images") as bar:
            for rows in of_prompt.values():
                group = _readable(made, rows)
                scores = [float(dataset.numbers[column][row]) for row, _ in group]
                pairs = pairs_of(scores, pairing)
                wide = [pair for pair in pairs if pair[2] >= min_margin]
                for winner, loser, margin in wide:
                    made.keep(_pair(dataset, group[winner], group[loser], margin))
                made.dropped["pair closer than min_margin"] += len(pairs) - len(wide)
                made.dropped["image without a pair"] += bool(group) and not pairs and len(group)
                bar.advance(len(rows))
        made.read = len(dataset)
    return made.summary()


def _readable(made: Making, rows: list[int]) -> list[tuple[int, bytes]]:
    """A prompt's different images that can be decoded, with their rows."""
    found: dict[bytes, tuple[int, bytes]] = {}
    for row in rows:
        content = made.dataset.image_bytes(row, "image")
        key = hashlib.sha256(content).digest()
        if key in found:
            made.drop(row, "same image and prompt")
            continue
        try:
            decode(content)
        except BadImage as error:
            made.drop_bad(row, f"image_{error.reason}", str(error))
            continue
        found[key] = row, content
    return list(found.values())


def _pair(dataset: PreferenceDataset, winner: tuple[int, bytes], loser: tuple[int, bytes], margin: float) -> PairRow:
    better, worse = (single_image(dataset, row, "image", content) for row, content in (winner, loser))
    both = (("chosen", better), ("rejected", worse))
    return PairRow(
        id=f"{better.id}-{worse.id}",
        prompt=better.prompt,
        chosen=better.image,
        rejected=worse.image,
        chosen_prompt=better.image_prompt,
        rejected_prompt=worse.image_prompt,
        margin=margin,
        chosen_id=better.image_id or better.id,
        rejected_id=worse.image_id or worse.id,
        chosen_model=better.image_model,
        rejected_model=worse.image_model,
        scores={f"{side}_{name}": score for side, image in both for name, score in image.scores.items()},
    )
