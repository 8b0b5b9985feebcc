"""What an image looks like as a vector of numbers, so that images can be near to or far from one another."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import safetensors.numpy
from PIL import Image
from safetensors import SafetensorError, safe_open

from diffpref.errors import UserError, nearest
from diffpref.evaluate.folders import GeneratedImage, open_image, read_folder
from diffpref.files import write_whole
from diffpref.progress import Bar
from diffpref.scorers.base import Prepare

if TYPE_CHECKING:
    from diffpref.scorers.parts.clip import Clip

BATCH_SIZE = 64
Key = tuple[str, int]  # an image's prompt and index


@runtime_checkable
class Features(Protocol):
    """Images to vectors; the distance of two images is the Euclidean distance of theirs.

    Only distances within one version mean the same.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """The features, (n, width) fp32, of n images in RGB."""
        ...


@dataclass(frozen=True)
class Pixels:
    """Colours and edges, without weights: it sees what changes in a picture, not what the picture means.

    The colours of 16 x 16 tiles, divided by the root of their number: two pictures of one colour each lie as far apart
    as their colours, black and white 1. Beside them, for each of 4 x 4 tiles and 8 directions, how strong the edges
    are: the root of the mean slope of the brightness at 64 x 64 pixels, divided by 4.
    """

    name: str = "pixels"
    version: str = "1"

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """The features, (n, 896) fp32, of n images in RGB."""
        return np.stack([np.concatenate([_colours(image), _edges(image)]) for image in images]).astype(np.float32)


@dataclass(frozen=True)
class ClipFeatures:
    """The image features of a CLIP, of length 1: distances run from 0 to 2, and see what a picture means."""

    name: str
    version: str
    clip: "Clip"
    prepare: Prepare

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """The features, (n, width) fp32, of n images in RGB."""
        return self.clip.images([self.prepare(image) for image in images]).cpu().numpy()


FEATURES = ("pixels", "clip-h", "clip-l", "none")


def load_features(wanted: str, device: str = "cpu") -> Features | None:
    """The features of a name, or of `NAME=WEIGHTS` for a CLIP's; None for `none`.

    Raises UserError with the nearest right name for an unknown one, and for weights that cannot be read.
    """
    name, _, weights = wanted.partition("=")
    if name not in FEATURES:
        raise UserError(f"--features: unknown {name!r}: {nearest(name, FEATURES)}")
    if name.startswith("clip-"):
        return _clip_features(name, weights, device)
    if weights:
        raise UserError(f"--features: {name} takes no weights, but {weights} is given")
    return Pixels() if name == "pixels" else None


def _clip_features(name: str, weights: str, device: str) -> Features:
    from diffpref.scorers.clip_h import CLIP_H
    from diffpref.scorers.clip_l import CLIP_L
    from diffpref.scorers.parts.clip import load_clip

    of = {"clip-h": CLIP_H, "clip-l": CLIP_L}[name]
    clip = load_clip(weights or of.home, of.files, of.architecture, of.known, name, device, "fp32")
    prepare = of.pixels(clip.size)
    identity = json.dumps({**clip.identity, "preprocessing": str(prepare)}, sort_keys=True)
    return ClipFeatures(name, hashlib.sha256(identity.encode()).hexdigest()[:12], clip, prepare)


def features_of(folder: Path, features: Features) -> dict[Key, np.ndarray]:
    """The features of each image of a folder, kept beside it in `features/NAME.safetensors` as long as they hold."""
    images = read_folder(folder)
    file = folder / "features" / f"{features.name}.safetensors"
    identity = _identity(folder, images, features)
    vectors = _read(file, identity, images)
    if vectors is None:
        vectors = _compute(folder, images, features)
        write_whole(file, safetensors.numpy.save({"features": vectors}, {"identity": identity}))
    return {(image.prompt, image.index): vector for image, vector in zip(images, vectors, strict=True)}


def _compute(folder: Path, images: Sequence[GeneratedImage], features: Features) -> np.ndarray:
    found = []
    with Bar(f"{features.name} features of {folder.name}", len(images), "images") as bar:
        for start in range(0, len(images), BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE]
            found.append(features([open_image(image) for image in batch]))
            bar.advance(len(batch))
    return np.concatenate(found)


def _identity(folder: Path, images: Sequence[GeneratedImage], features: Features) -> str:
    """A hash of all that the features depend on but the pixels, whose files must be older than the features'."""
    listed = [[image.file.relative_to(folder).as_posix(), image.prompt, image.index] for image in images]
    return hashlib.sha256(json.dumps([features.name, features.version, listed]).encode()).hexdigest()


def _read(file: Path, identity: str, images: Sequence[GeneratedImage]) -> np.ndarray | None:
    """The kept features, or None where there are none or the images have changed since."""
    try:
        written = file.stat().st_mtime_ns
        with safe_open(file, framework="numpy") as kept:
            if (kept.metadata() or {}).get("identity") != identity:
                return None
            vectors = kept.get_tensor("features")
    except (OSError, SafetensorError):
        return None
    if any(image.file.stat().st_mtime_ns > written for image in images):
        return None
    return vectors


def _colours(image: Image.Image) -> np.ndarray:
    tiles = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=np.float64) / 255
    return tiles.ravel() / np.sqrt(tiles.size)


def _edges(image: Image.Image) -> np.ndarray:
    grey = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX), dtype=np.float64) / 255
    down, right = np.gradient(grey)
    slope = np.hypot(down, right)
    direction = np.rint(np.arctan2(down, right) * 4 / np.pi).astype(int) % 8
    tile = np.arange(64) // 16
    cell = (4 * tile[:, None] + tile[None, :]) * 8 + direction
    return np.sqrt(np.bincount(cell.ravel(), weights=slope.ravel(), minlength=128) / 256) / 4
