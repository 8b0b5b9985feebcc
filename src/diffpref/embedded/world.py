"""The embedded world: pictures of one coloured shape, the captions that name them, and a painter.

A composition fixes five attributes (size, colour, shape, position, background): 2 x 6 x 4 x 3 x 3 = 432 of them.
The painter draws a composition with a little jitter, by signed distances, at 32 x 32 pixels. `clutter` spoils a
painting the way scraped pictures are spoilt: specks and uneven light. Everything is NumPy and a function of
its generator, so the whole default can be made again from its seed.
"""

import itertools
from dataclasses import dataclass, fields, replace

import numpy as np

SIDE = 32
SIZES = {"small": 6.0, "large": 9.5}  # half extent in pixels
COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 140, 36),
    "yellow": (246, 220, 60),
    "green": (44, 160, 70),
    "blue": (48, 84, 210),
    "purple": (146, 62, 186),
}
SHAPES = ("circle", "square", "triangle", "cross")
POSITIONS = {"left": 10.5, "centre": 16.0, "right": 21.5}  # x of the middle, in pixels
BACKGROUNDS = {"black": (16, 16, 20), "grey": (128, 128, 130), "white": (240, 240, 238)}

PLACES = {"left": "on the left", "centre": "in the centre", "right": "on the right"}
TEMPLATES = (
    "a {size} {colour} {shape} {place}, {background} background",
    "{background} background with a {size} {colour} {shape} {place}",
    "a {colour} {shape}, {size}, {place}, on {background}",
)


@dataclass(frozen=True)
class Composition:
    """What a picture shows: one value for each attribute."""

    size: str
    colour: str
    shape: str
    position: str
    background: str

    def caption(self, template: int = 0) -> str:
        """The caption of this composition in one of the `TEMPLATES`."""
        return TEMPLATES[template].format(
            size=self.size,
            colour=self.colour,
            shape=self.shape,
            place=PLACES[self.position],
            background=self.background,
        )


VALUES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}
ATTRIBUTES = tuple(field.name for field in fields(Composition))


def compositions() -> list[Composition]:
    """All 432 compositions in a fixed order."""
    return [Composition(*values) for values in itertools.product(*(VALUES[name] for name in ATTRIBUTES))]


def read_caption(caption: str) -> dict[str, str]:
    """The attributes that a caption names: `{"colour": "red", ...}`; attributes left unsaid are absent."""
    words = caption.lower().replace(",", " ").split()
    return {name: word for name in ATTRIBUTES for word in words if word in VALUES[name]}


def miscaptioned(composition: Composition, rate: float, rng: np.random.Generator) -> Composition:
    """The composition with each attribute drawn afresh with probability `rate`: a careless caption's content."""
    redrawn = {name: str(rng.choice(VALUES[name])) for name in ATTRIBUTES if rng.random() < rate}
    return replace(composition, **redrawn)


def coverage(shape: str, x: float, y: float, half: float) -> np.ndarray:
    """How much of each pixel a shape covers: float64 (SIDE, SIDE) in [0, 1], from its signed distance in pixels.

    Every shape fills a box of 2 `half` by 2 `half` around (x, y).
    """
    grid = np.arange(SIDE) + 0.5
    dx, dy = np.meshgrid(grid - x, grid - y)
    if shape == "circle":
        distance = np.hypot(dx, dy) - half
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - half
    elif shape == "triangle":  # apex at the top; the two slanted edges have the normal (2, -1) / sqrt(5)
        distance = np.maximum((2 * abs(dx) - dy - half) / np.sqrt(5), dy - half)
    elif shape == "cross":
        arm = 0.38 * half
        across = np.maximum(abs(dx) - half, abs(dy) - arm)
        upright = np.maximum(abs(dy) - half, abs(dx) - arm)
        distance = np.minimum(across, upright)
    else:
        raise ValueError(f"unknown shape {shape!r}: one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def blend(background: np.ndarray, colour: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Lay a colour over a background: (3,) and (3,) under a cover of (SIDE, SIDE) -> (SIDE, SIDE, 3)."""
    return background + cover[..., None] * (colour - background)


def paint(composition: Composition, rng: np.random.Generator, clutter: float = 0.0) -> np.ndarray:
    """Draw a composition: uint8 (SIDE, SIDE, 3). `clutter` in [0, 1] spoils it; 0 is a clean painting."""
    x = POSITIONS[composition.position] + rng.uniform(-1, 1)
    y = SIDE / 2 + rng.uniform(-1.5, 1.5)
    half = SIZES[composition.size] * rng.uniform(0.94, 1.06)
    colour = np.array(COLOURS[composition.colour]) + rng.uniform(-10, 10, 3)
    background = np.array(BACKGROUNDS[composition.background]) + rng.uniform(-5, 5)
    picture = blend(background, colour, coverage(composition.shape, x, y, half))
    if clutter > 0:
        picture = _spoil(picture, clutter, rng)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _spoil(picture: np.ndarray, clutter: float, rng: np.random.Generator) -> np.ndarray:
    picture = picture * np.linspace(1 - 0.3 * clutter * rng.random(), 1, SIDE)[:: rng.choice([-1, 1]), None]
    for _ in range(rng.poisson(10 * clutter)):  # specks of 2 x 2
        row, column = rng.integers(0, SIDE - 1, 2)
        picture[row : row + 2, column : column + 2] = rng.uniform(0, 255, 3)
    return picture
