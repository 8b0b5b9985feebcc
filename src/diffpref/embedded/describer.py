"""The embedded describer: a caption of what a picture of the embedded world shows, from its pixels alone.

It names what the judge can measure and leaves out the rest, so it may say less than there is, and says nothing of what
was asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from diffpref.embedded import world
from diffpref.embedded.judge import measure


@dataclass(frozen=True)
class Describer:
    """Captions images by measuring pixels. Raise `version` whenever its captions change."""

    name: str = "embedded"
    version: str = "1"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], draws: Sequence[int]) -> list[str]:
        """One caption for each image; the prompts are not looked at, and nothing is drawn."""
        return [describe(image) for image in images]


def describe(image: Image.Image) -> str:
    """What an image shows, worded as the first of the training captions' templates; "" where nothing can be named."""
    seen = measure(image).attributes
    words = [seen.get(name) for name in ("size", "colour", "shape")] + [world.PLACES.get(seen.get("position", ""))]
    thing = " ".join(word for word in words if word)
    behind = seen.get("background")
    return ", ".join([f"a {thing}"] * bool(thing) + [f"{behind} background"] * bool(behind))
