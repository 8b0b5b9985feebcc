"""The embedded judge: from pixels alone, how much of a prompt does an image show, and how cleanly.

It separates the object from the background, measures each attribute, paints what it measured and takes the difference
from the image as dirt. It never sees how an image was made. The score is the mean of one mark (0 or 1) for each
attribute that the prompt names and of the cleanness (0 to 1); so it is a float in [0, 1].
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffpref.embedded import world

OBJECT_CONTRAST = 0.2  # distance from the background (RGB in [0, 1], Euclidean) from which a pixel is the object's
SMALLEST_OBJECT = 12  # pixels
FARTHEST_COLOUR = 0.3  # a colour farther than this from every known one has no name
LOWEST_OVERLAP = 0.7  # intersection over union under which a silhouette has no name
DIRT_SCALE = 0.04  # mean absolute difference at which the cleanness has fallen to 1/e


@dataclass(frozen=True)
class Measurement:
    """What the judge sees: the attributes that it could name, and the cleanness in [0, 1]."""

    attributes: dict[str, str]
    cleanness: float

    def marks(self, prompt: str) -> dict[str, float]:
        """One mark for each attribute that the prompt names (1 right, 0 wrong or unseen), and the cleanness.

        Raises ValueError if the prompt names no attribute of the embedded world.
        """
        asked = world.read_caption(prompt)
        if not asked:
            raise ValueError(f"the judge knows only the embedded world's words; the prompt has none: {prompt!r}")
        right = {name: float(self.attributes.get(name) == value) for name, value in asked.items()}
        return {**right, "cleanness": self.cleanness}


def judge(image: Image.Image, prompt: str) -> float:
    """The score of an image for a prompt, in [0, 1]."""
    marks = measure(image).marks(prompt)
    return sum(marks.values()) / len(marks)


def measure(image: Image.Image) -> Measurement:
    """Measure an image of any size; it is read at the world's 32 x 32."""
    rgb = image.convert("RGB")
    if rgb.size != (world.SIDE, world.SIDE):
        rgb = rgb.resize((world.SIDE, world.SIDE), Image.Resampling.BOX)
    pixels = np.asarray(rgb, dtype=np.float64) / 255

    background = np.median(_border(pixels), axis=0)
    attributes = {}
    if name := _nearest(background, world.BACKGROUNDS):
        attributes["background"] = name
    contrast = np.linalg.norm(pixels - background, axis=-1)
    part = _largest_part(contrast > OBJECT_CONTRAST)
    if part.sum() < SMALLEST_OBJECT:
        return Measurement(attributes, _cleanness(pixels, background))

    # The half of the pixels that stand out most are the object's own colour; the others are mixed at its edges.
    core = part & (contrast >= np.median(contrast[part]))
    colour = np.median(pixels[core], axis=0)
    seen = np.where(part, np.clip(contrast / np.linalg.norm(colour - background), 0, 1), 0.0)
    inside = seen > 0.5
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    x, y = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    half = max(columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1) / 2
    attributes["size"] = min(world.SIZES, key=lambda name: abs(np.log(half / world.SIZES[name])))
    attributes["position"] = min(world.POSITIONS, key=lambda name: abs(x - world.POSITIONS[name]))
    if name := _nearest(colour, world.COLOURS):
        attributes["colour"] = name
    shape, overlap, cover = _fit(seen, x, y, half)
    if overlap > LOWEST_OVERLAP:
        attributes["shape"] = shape
    return Measurement(attributes, _cleanness(pixels, world.blend(background, colour, cover)))


def _border(pixels: np.ndarray) -> np.ndarray:
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[2:-2, 2:-2] = True
    return pixels[~inner]


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(value) / 255)) for name, value in palette.items()}
    name = min(distances, key=lambda key: distances[key])
    return name if distances[name] < FARTHEST_COLOUR else None


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected part: every pixel takes the largest number among its part's by spreading it."""
    numbers = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(numbers, 1)
        around = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        spread = np.where(mask, np.maximum.reduce([numbers, *around]), 0)
        if (spread == numbers).all():
            break
        numbers = spread
    counts = np.bincount(numbers.ravel())
    counts[0] = 0
    return mask & (numbers == counts.argmax())


def _fit(seen: np.ndarray, x: float, y: float, half: float) -> tuple[str, float, np.ndarray]:
    """The shape whose coverage is nearest to the seen one, their overlap (intersection over union), its coverage."""
    best = ("", -1.0, np.zeros(seen.shape))
    for shape in world.SHAPES:
        for size in (half - 0.3, half, half + 0.3):
            cover = world.coverage(shape, x, y, size)
            overlap = np.minimum(cover, seen).sum() / np.maximum(cover, seen).sum()
            if overlap > best[1]:
                best = (shape, float(overlap), cover)
    return best


def _cleanness(pixels: np.ndarray, ideal: np.ndarray) -> float:
    return float(np.exp(-np.abs(pixels - ideal).mean() / DIRT_SCALE))
