"""The texts of images for DCPO (arXiv 2502.06023): captions of their own, and perturbed ones for the worse image.

The paper's modes: `c` writes a caption of its own for both images of a pair. `p` keeps the prompt for the better image
and perturbs it for the other one. `h` takes the captions of `c` and perturbs the worse image's. Which image is the
worse one, the row's label tells: below 0.5 it is the one that stands as chosen, for training turns such a pair round.
Of a tie nothing is perturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from diffpref.captioners.base import Captioner, NoCaption
from diffpref.data.images import BadImage, decode
from diffpref.data.schema import SIDES, PairRow, Row, Side
from diffpref.data.threads import map_in_order
from diffpref.draws import draw_seed
from diffpref.perturbers.base import Perturber

Mode = Literal["p", "h"]
TIE, SAME, EMPTY = "a perturbed text: tie", "a perturbed text: nothing to change", "a perturbed text: no caption"


@dataclass(frozen=True)
class Done:
    """What became of a row: the row with its texts and what it lacks, or the reason why it is left out.

    missing: what could not be had, by name, and why.
    """

    row: Row | None
    missing: dict[str, str]
    reason: str = ""
    detail: str = ""


def caption_rows(rows: Sequence[Row], captioner: Captioner, seed: int) -> list[Done]:
    """Every row with a caption of its own for each image; a row with a broken image is left out.

    A caption depends on its image, its prompt, the seed and the row's id. One that was there is replaced.
    """
    done: list[Done | None] = []
    asked: list[tuple[int, Side, Image.Image]] = []
    for place, images in enumerate(map_in_order(_decoded, rows)):
        broken = next((image for image in images.values() if isinstance(image, BadImage)), None)
        done.append(None if broken is None else Done(None, {}, f"image_{broken.reason}", str(broken)))
        if broken is None:
            asked += [(place, side, image) for side, image in images.items() if isinstance(image, Image.Image)]
    said = captioner(
        [image for _, _, image in asked],
        [rows[place].prompt for place, _, _ in asked],
        [draw_seed(seed, "caption", rows[place].id, side) for place, side, _ in asked],
    )
    captions: dict[int, dict[str, str | NoCaption]] = {}
    for (place, side, _), caption in zip(asked, said, strict=True):
        captions.setdefault(place, {})[f"{side}_prompt"] = caption
    return [each or _with_captions(rows[place], captions[place]) for place, each in enumerate(done)]


def perturb_rows(rows: Sequence[PairRow], perturber: Perturber, mode: Mode, seed: int) -> list[Done]:
    """Every pair with the texts of a mode. A text depends on what it was, on the seed and the row's id.

    A tie keeps the texts that both images had before, and a text that the perturber cannot change stays; both are told
    in `missing`.
    """
    texts = [_texts(row, mode) for row in rows]
    worse = [_worse(row) for row in rows]
    before = [None if column is None else texts[place][column] for place, column in enumerate(worse)]
    asked = [place for place, text in enumerate(before) if text and text.strip()]
    draws = [draw_seed(seed, "perturb", rows[place].id) for place in asked]
    written = dict(zip(asked, perturber([before[place] or "" for place in asked], draws), strict=True))
    done = []
    for place, row in enumerate(rows):
        column, after = worse[place], written.get(place, "")
        missing = {}
        if column is None:
            missing = {TIE: "ties have no worse image"}
        elif before[place] is None:
            missing = {EMPTY: f"the row has no {column}"}
        elif not after.strip() or after == before[place]:
            missing = {SAME: f"the perturber cannot change {before[place]!r}"}
        else:
            texts[place][column] = after
        done.append(Done(replace(row, **texts[place]), missing))
    return done


def _decoded(row: Row) -> dict[Side, Image.Image | BadImage]:
    return {side: _image(getattr(row, side)) for side in SIDES["pairs" if isinstance(row, PairRow) else "images"]}


def _image(content: bytes) -> Image.Image | BadImage:
    try:
        return decode(content)
    except BadImage as error:
        return error


def _with_captions(row: Row, captions: dict[str, str | NoCaption]) -> Done:
    missing = {column: caption.reason for column, caption in captions.items() if isinstance(caption, NoCaption)}
    texts = {column: None if isinstance(caption, NoCaption) else caption for column, caption in captions.items()}
    return Done(replace(row, **texts), missing)


def _texts(row: PairRow, mode: Mode) -> dict[str, str | None]:
    """The texts of a pair's images before one of them is perturbed."""
    if mode == "p":
        return {"chosen_prompt": row.prompt, "rejected_prompt": row.prompt}
    return {"chosen_prompt": row.chosen_prompt, "rejected_prompt": row.rejected_prompt}


def _worse(row: PairRow) -> str | None:
    """The column of the likelier loser's text, None of a tie."""
    return None if row.label == 0.5 else "rejected_prompt" if row.label > 0.5 else "chosen_prompt"
