"""What one pass over a dataset's images tells of each: enough for every question of the check, in 50 bytes an image."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import MAX_STRETCH, BadImage, open_picture
from diffpref.data.threads import groups, map_in_order
from diffpref.progress import Bar

BLANK = 2.0  # of 255: a picture whose every channel deviates less from its mean shows nothing
LEVELS = np.arange(256.0)
MESSAGES = 100  # broken rows of each reason whose message is kept
IMAGE = np.dtype(
    [("sha256", "S32"), ("width", np.int32), ("height", np.int32), ("format", "S4"), ("animated", "?"), ("blank", "?")]
)


@dataclass(frozen=True, eq=False)
class Facts:
    """Of every image of a split what `IMAGE` holds, (rows, sides); zeros where it cannot be decoded.

    broken: by reason, the rows with such an image, each with a message (the first rows only, then "").
    """

    images: np.ndarray
    broken: dict[str, dict[int, str]] = field(default_factory=dict)

    @property
    def decoded(self) -> np.ndarray:
        """Which images are pictures, bool (rows, sides)."""
        return self.images["width"] > 0


def gather(dataset: PreferenceDataset, bar: Bar) -> Facts:
    """Decode every image of a dataset, in threads: decoders and SHA-256 do their work without Python's lock."""
    facts = Facts(np.zeros((len(dataset), len(dataset.sides)), IMAGE))
    for row, found in map_in_order(_look_at_row, _rows(dataset)):
        for side, (name, seen) in enumerate(zip(dataset.sides, found, strict=True)):
            if isinstance(seen, BadImage):
                rows = facts.broken.setdefault(seen.reason, {})
                rows.setdefault(row, f"{name}: {seen}" if len(rows) < MESSAGES else "")
            else:
                facts.images[row, side] = seen
        bar.advance()
    return facts


def _rows(dataset: PreferenceDataset) -> Iterator[tuple[int, list[bytes]]]:
    """Each row with its images, which come one after another from `iter_images`."""
    for group in groups(dataset.iter_images(), len(dataset.sides)):
        yield group[0][0], [content for _, _, content in group]


def _look_at_row(given: tuple[int, list[bytes]]) -> tuple[int, list[tuple | BadImage]]:
    row, contents = given
    return row, [_look(content) for content in contents]


def _look(content: bytes) -> tuple | BadImage:
    """The fields of `IMAGE`, or why there is no picture."""
    try:
        picture = open_picture(content)
    except BadImage as error:
        return error
    width, height = picture.image.size
    if max(width, height) > MAX_STRETCH * min(width, height):
        return BadImage("too_long", f"{width} x {height} pixels, one side over {MAX_STRETCH} times the other")
    digest = hashlib.sha256(content).digest()
    return digest, width, height, picture.format.encode(), picture.animated, is_blank(picture.image)


def is_blank(image: Image.Image) -> bool:
    """Whether an RGB picture shows next to nothing: black, white or any one colour, up to a codec's noise."""
    counts = np.array(image.histogram()).reshape(3, 256) / (image.width * image.height)
    mean, of_squares = counts @ LEVELS, counts @ LEVELS**2
    return bool((of_squares - mean**2 < BLANK**2).all())
