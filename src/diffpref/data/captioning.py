"""The texts of images for DCPO (arXiv 2502.06023): captions of their own, and perturbed ones for the worse image.

The paper's modes: `c` writes a caption of its own for both images of a pair. `p` keeps the prompt for the better image
and perturbs it for the other one. `h` takes the captions of `c` and perturbs the worse image's. Which image is the
worse one, the row's label tells: below 0.5 it is the one that stands as chosen, for training turns such a pair round.
Of a tie nothing is perturbed. The tools are asked through the engine, so nothing is written twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from diffpref.captioners.base import Captioner, NoCaption
from diffpref.data.choice import MAX_BAD_SHARE
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.engine import (
    Asked,
    Once,
    Question,
    Refusal,
    Running,
    Say,
    Stage,
    ask,
    image_questions,
    is_main,
    ledger_of,
)
from diffpref.data.making import Making, making, whole_already
from diffpref.data.schema import DatasetSummary, PairRow
from diffpref.draws import draw_seed
from diffpref.errors import UserError
from diffpref.perturbers.base import Perturber
from diffpref.progress import track

Mode = Literal["p", "h"]
Identity = dict[str, str | float]
TIE, SAME, EMPTY = "a perturbed text: tie", "a perturbed text: nothing to change", "a perturbed text: no caption"
BATCH = 32  # questions that a tool sees at once, if not told; it cuts them further by its own batch size


def caption_dataset(
    dataset: PreferenceDataset,
    output: Path,
    load: Callable[[], Captioner],
    identity: Identity,
    running: Running | None = None,
    overwrite: bool = False,
    batch: int = BATCH,
) -> DatasetSummary | None:
    """The dataset with a caption of its own for every image, in `chosen_prompt, rejected_prompt` or `image_prompt`.

    identity: what captions depend on besides images and prompts, the captioner's name, version and options. What is
    drawn depends on its `seed` and the prompt. Captions that were there are replaced. Those that the ledger holds are
    not made again. batch: images that the captioner is given at once. None on ranks above 0. Raises UserError where
    `output` is taken or over 5% of the rows have broken images, which are left out.
    """
    if not overwrite and (whole := whole_already(dataset, output, "caption", identity)):
        return whole if is_main() else None
    running, ledger = running or Running(), ledger_of(dataset.path, (running or Running()).ledger)
    columns = [f"{side}_prompt" for side in dataset.sides]
    say = partial(_captions_of, Once(load), int(identity.get("seed", 0)))
    stage = Stage(f"caption-{identity['captioner']}", identity, say, "text", batch)
    if not is_main():
        ask(stage, image_questions(dataset, ledger), dataset, ledger, running)
        return None
    with making(dataset, output, "caption", identity, dataset.kind, dataset.score_columns(), overwrite) as made:
        answers = ask(stage, image_questions(dataset, ledger), dataset, ledger, running)
        without, why = 0, ""
        for _, row, said in made.answered([answers] if answers else []):
            captions = {name: answer.value for name, answer in zip(columns, said[0], strict=True)}
            made.missing.update(name for name, caption in captions.items() if caption is None)
            without += None in captions.values()
            why = why or next((answer.why for answer in said[0] if answer.why), "")
            made.keep(replace(row, **captions))
        _warn_of_missing(made, without, why)
    return made.summary()


def perturb_dataset(
    dataset: PreferenceDataset,
    output: Path,
    load: Callable[[], Perturber],
    identity: Identity,
    mode: Mode,
    running: Running | None = None,
    overwrite: bool = False,
    batch: int = BATCH,
) -> DatasetSummary | None:
    """The pairs with the texts of a mode, in `chosen_prompt` and `rejected_prompt`.

    identity: the perturber's name, version and options. A text depends on what it was, on the `seed` among these and on
    the row's id. A tie keeps the texts that both images had, and a text that the perturber cannot change stays; both
    are counted in `missing`. None on ranks above 0. Raises UserError for single images, where `output` is taken, and
    for mode h where no row has captions.
    """
    if dataset.kind != "pairs":
        raise UserError(f"{dataset.path} holds single images; only of pairs is one image the worse one")
    texts = dataset.texts
    if mode == "h" and not any(text for name in ("chosen_prompt", "rejected_prompt") for text in texts.get(name, [])):
        raise UserError(f"--mode h: {dataset.path} has no captions of images; `diffpref data caption` writes them")
    options: Identity = {**identity, "mode": mode}
    if not overwrite and (whole := whole_already(dataset, output, "perturb", options)):
        return whole if is_main() else None
    running, ledger = running or Running(), ledger_of(dataset.path, (running or Running()).ledger)
    say = partial(_perturbed_of, Once(load), int(identity.get("seed", 0)))
    stage = Stage(f"perturb-{identity['perturber']}", identity, say, "text", batch)
    if not is_main():
        ask(stage, _questions(dataset, mode), dataset, ledger, running)
        return None
    with making(dataset, output, "perturb", options, "pairs", dataset.score_columns(), overwrite) as made:
        answers = ask(stage, _questions(dataset, mode), dataset, ledger, running)
        asked = 0
        for number, row in enumerate(track(dataset.rows(), "perturb", len(dataset), "rows")):
            assert isinstance(row, PairRow)
            written = {side: _before(dataset, number, side, mode) for side in ("chosen", "rejected")}
            worse = _worse(float(dataset.labels[number]))
            before = written[worse] if worse else None
            if worse is None:
                made.missing[TIE] += 1
            elif not before or not before.strip():
                made.missing[EMPTY] += 1
            else:
                after = answers[asked].value if answers else None
                asked += 1
                if isinstance(after, str) and after.strip() and after != before:
                    written[worse] = after
                else:
                    made.missing[SAME] += 1
            made.keep(replace(row, chosen_prompt=written["chosen"], rejected_prompt=written["rejected"]))
    return made.summary()


def _questions(dataset: PreferenceDataset, mode: Mode) -> Iterator[Question]:
    """The worse image's text of each pair that has one, with the row's id as what is drawn by."""
    for row in range(len(dataset)):
        worse = _worse(float(dataset.labels[row]))
        text = _before(dataset, row, worse, mode) if worse else None
        if text and text.strip():
            yield Question(text, name=dataset.ids[row])


def _before(dataset: PreferenceDataset, row: int, side: str, mode: Mode) -> str | None:
    """The text of an image before anything is perturbed."""
    if mode == "p":
        return dataset.prompts[row]
    return dataset.texts.get(f"{side}_prompt", [None] * len(dataset))[row]


def _worse(label: float) -> Literal["chosen", "rejected"] | None:
    """The side of the likelier loser, None of a tie."""
    return None if label == 0.5 else "rejected" if label > 0.5 else "chosen"


def _warn_of_missing(made: Making, without: int, why: str) -> None:
    if without > MAX_BAD_SHARE * made.kept:
        told = f"{without} of {made.kept} rows have an image without a caption; the first: {why or 'no words'}"
        print(f"diffpref: warning: {told}", file=sys.stderr)


def _captions_of(load: Once[Captioner], seed: int) -> Say:
    return partial(_captions, load, seed)  # not loaded before something is asked that the ledger cannot answer


def _captions(load: Once[Captioner], seed: int, asked: list[Asked]) -> list[str | Refusal]:
    images = [each.image for each in asked if each.image is not None]
    draws = [draw_seed(seed, "caption", each.text) for each in asked]
    said = load()(images, [each.text for each in asked], draws)
    return [Refusal(each.reason) if isinstance(each, NoCaption) else each for each in said]


def _perturbed_of(load: Once[Perturber], seed: int) -> Say:
    return partial(_perturbed, load, seed)


def _perturbed(load: Once[Perturber], seed: int, asked: list[Asked]) -> list[str]:
    draws = [draw_seed(seed, "perturb", each.name) for each in asked]
    return [*load()([each.text for each in asked], draws)]
