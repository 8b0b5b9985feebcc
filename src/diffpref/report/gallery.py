"""The pictures of the report, as data: addresses inside the page."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffpref.evaluate.compare import Comparison, Pair
from diffpref.evaluate.folders import GeneratedImage, open_image, read_folder

CRISP_BELOW = 128  # pixels: a smaller picture is enlarged by whole pixels, not blurred
LARGEST_SHOWN = 512  # pixels: a larger picture is reduced, so that the page stays one file to send
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Choice:
    """Some of the pairs, how they were chosen, and of how many."""

    title: str
    how: str
    pairs: list[Pair]


def choices(comparison: Comparison, size: int) -> list[Choice]:
    """About `size` pairs chosen in three honest ways: at random, the largest wins, the largest losses."""
    each = max(1, size // 3)
    pairs = list(comparison.pairs)
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(pairs))
    drawn = [pairs[place] for place in order[:each]]
    by_difference = sorted(pairs, key=lambda pair: pair.difference)
    wins = [pair for pair in reversed(by_difference) if pair.difference > 0][:each]
    losses = [pair for pair in by_difference if pair.difference < 0][:each]
    return [
        Choice("Random", f"{len(drawn)} of {len(pairs)} pairs, drawn without looking at scores.", drawn),
        Choice("Largest wins", _how(len(wins), comparison.wins, "won by the tuned model", "gains"), wins),
        Choice("Largest losses", _how(len(losses), comparison.losses, "lost by the tuned model", "drops"), losses),
    ]


def pair_card(pair: Pair) -> str:
    """Base and tuned image of one prompt and seed, with their scores."""
    change = "win" if pair.difference > 0 else "loss" if pair.difference < 0 else "tie"
    seed = "" if pair.seed is None else f"<span>seed {pair.seed}</span>"
    shown = [
        (side, f"{score:.3f}", _picture(GeneratedImage(file, pair.prompt, pair.index, pair.seed), side))
        for side, file, score in (("base", pair.file_a, pair.score_a), ("tuned", pair.file_b, pair.score_b))
    ]
    return card(shown, pair.prompt, f'{seed}<b class="{change}">{_signed(pair.difference)}</b>')


def card(shown: list[tuple[str, str, str]], prompt: str, note: str) -> str:
    """Images side by side, each (name, value, markup of the picture), over their prompt and a note, which is markup."""
    images = [
        f'<div><div class="label"><span>{html.escape(name)}</span><b>{html.escape(value)}</b></div>{picture}</div>'
        for name, value, picture in shown
    ]
    return (
        f'<figure class="card {"pair" * (len(shown) > 1)}"><div class="images">{"".join(images)}</div>'
        f'<figcaption><p dir="auto">{html.escape(prompt)}</p><p class="note">{note}</p></figcaption></figure>'
    )


def sample_cards(folder: Path, size: int) -> list[str]:
    """The first `size` images of a generated folder, each with its prompt."""
    cards = []
    for image in read_folder(folder)[:size]:
        seed = "" if image.seed is None else f'<p class="note"><span>seed {image.seed}</span></p>'
        caption = f'<figcaption><p dir="auto">{html.escape(image.prompt)}</p>{seed}</figcaption>'
        cards.append(f'<figure class="card">{_picture(image, "sample")}{caption}</figure>')
    return cards


def _how(shown: int, of: int, what: str, change: str) -> str:
    return f"The {shown} largest {change} in score among the {of} pairs {what}." if shown else f"No pair was {what}."


def _signed(difference: float) -> str:
    return f"{difference:+.3f}".replace("-", "−") if difference else "tie"


def _picture(image: GeneratedImage, side: str) -> str:
    return picture(open_image(image), f"{side}: {image.prompt}")


def picture(image: Image.Image, text: str, largest: int = LARGEST_SHOWN) -> str:
    """An `img` of the picture with a text instead of it, written anew, so nothing but pixels enters the page."""
    crisp = ' class="crisp"' if max(image.size) < CRISP_BELOW else ""
    shown = image.copy()
    shown.thumbnail((largest, largest))
    form = "PNG" if max(image.size) <= 2 * CRISP_BELOW else "JPEG"
    written = io.BytesIO()
    shown.save(written, form, quality=90, optimize=True)
    data = base64.b64encode(written.getvalue()).decode("ascii")
    source = f'src="data:image/{form.lower()};base64,{data}"'
    width, height = shown.size
    return f'<img{crisp} {source} width="{width}" height="{height}" alt="{html.escape(text)}">'
