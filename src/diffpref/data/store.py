"""The store of latents and text embeddings: what the VAE and the text encoder say, computed once.

Keys are content: an image's latents belong to its bytes' SHA-256, its flip and the recipe (VAE weights, size, crop,
mean or moments, dtype, version of this code); a text embedding to its prompt and the text encoder's weights. So a
repeated image is stored once, another size or VAE never reads stale rows, and building makes only what is missing. Each
bucket has a recipe and so shards of its own. Any number of processes may build at once. Latents are unscaled, in fp16:
the posterior's mean, or its mean and log variance.
"""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffpref.data.buckets import Size, bucket_sizes
from diffpref.data.building import Claims, Unreadable, clean, image_hashes, share
from diffpref.data.choice import refuse_many_bad
from diffpref.data.dataset import PreferenceDataset, RowGroup
from diffpref.data.images import BadImage, decode
from diffpref.data.measuring import Buckets, assign_buckets, refuse_sizes
from diffpref.data.pixels import to_pixels
from diffpref.data.prompts import warn_of_cut
from diffpref.data.shard import TensorWriter
from diffpref.data.shards import Shards, as_keys, key_of
from diffpref.data.views import View, sampled
from diffpref.errors import RunError, UserError
from diffpref.progress import Bar
from diffpref.train.config import DataConfig
from diffpref.types import Backbone, Cond

log = logging.getLogger("diffpref")
VERSION = "3"  # raise it when the way from bytes to latents, or what a shard is, changes
IMAGE_BATCH, TEXT_BATCH = 16, 64
PIXELS = 4 * 512 * 512  # of a batch of images, from 256 x 256 on: a VAE in fp32 then needs about 4 GB
THREADS = 4


@dataclass(frozen=True)
class Store:
    """Latents and text embeddings of a dataset.

    latents: the shards of each bucket.
    hashes: the SHA-256 of each row's images (chosen and rejected, or the one), uint8 (rows, sides, 32).
    places: where their latents stand in the shards of the row's bucket, plain and if they are stored mirrored, int64
    (rows, sides, 1 or 2); -1 for rows that cannot be decoded or that the options leave out.
    bad: what is wrong with the former, by row.
    moments: whether latents are stored as mean and log variance.
    """

    latents: tuple[Shards, ...]
    text: dict[str, Shards]
    buckets: Buckets
    hashes: np.ndarray
    places: np.ndarray
    bad: dict[int, str]
    moments: bool

    @property
    def computes(self) -> bool:
        return False

    def read(self, views: list[View]) -> tuple[Tensor, set[int]]:
        """The unscaled latents (n, C, h, w) fp32 of views of rows that are not `bad`; all of them can be read.

        Raises ValueError for views of several buckets.
        """
        shards = self.latents[self.buckets.of([view.row for view in views])]
        places = self.places[[v.row for v in views], [v.side for v in views], [int(v.mirrored) for v in views]]
        rows = shards.at(places)
        return sampled(rows, views) if self.moments else rows, set()

    def prompts(self, prompts: list[str]) -> Cond:
        """Conditioning of n prompts, fp32 but for masks and whole numbers."""
        keys = as_keys([key_of(prompt) for prompt in prompts])
        return {name: shards.rows(keys) for name, shards in self.text.items()}

    @property
    def nbytes(self) -> int:
        """The size of its shards."""
        return sum(shards.nbytes for shards in (*self.latents, *self.text.values()))


def build_store(
    folder: Path,
    dataset: PreferenceDataset,
    backbone: Backbone,
    data: DataConfig,
    shown: bool = True,
    summed: bool = False,
) -> Store:
    """Encode what the store lacks, together with other processes that are at it, and open it.

    shown: whether progress is. summed: sum every shard, whatever its time says.
    Rows that the options leave out are passed over. Rows whose images cannot be decoded are named in `bad`; more than
    5% of them raise UserError.
    """
    identity = backbone.identity()
    refuse_sizes(backbone, data)
    recipes = [_recipe(identity["vae"], size, data) for size in bucket_sizes(data)]
    text_recipe = _digest(identity["text"], "float16", VERSION)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)
        claims = Claims(folder)
        buckets = assign_buckets(folder, dataset, data, shown)
        latents = tuple(Shards(folder, "latents", recipe, summed) for recipe in recipes)
        text = {name: Shards(folder, f"text_{name}", text_recipe, summed) for name in backbone.cond_names}
        for file in (file for shards in (*latents, *text.values()) for file in shards.damaged):
            log.warning("%s is damaged; what it lacks is made again", file)
        images = _Images(folder, recipes, latents, buckets, dataset, backbone, data)
        images.fill(claims, shown)
        _encode_prompts(folder, text_recipe, text, claims, dataset, backbone, shown)
    except OSError as error:
        raise UserError(f"data.cache: cannot write {folder}: {error.strerror}") from error
    bad = images.bad()
    refuse_many_bad(dataset, bad, int(images.wanted.sum()))
    places = images.places(range(len(dataset)))
    return Store(latents, text, buckets, images.hashes.rows, places, bad, data.latents == "moments")


class _Images:
    """A dataset's images on their way into the store. wanted: which rows the options leave in, bool (rows,)."""

    def __init__(
        self,
        folder: Path,
        recipes: list[str],
        latents: tuple[Shards, ...],
        buckets: Buckets,
        dataset: PreferenceDataset,
        backbone: Backbone,
        data: DataConfig,
    ) -> None:
        self.hashes = image_hashes(folder, dataset)
        self.unreadable = Unreadable(folder, recipes[0])  # the square's: no size makes an image readable
        self.wanted = np.ones(len(dataset), bool)
        self.wanted[list(dataset.left_out)] = False
        self._latents, self._buckets = latents, buckets
        self._dataset, self._backbone, self._data = dataset, backbone, data
        self._writers = [TensorWriter(folder, "latents", recipe) for recipe in recipes]
        self._waiting: list[dict[bytes, bytes]] = [{} for _ in recipes]  # images of each bucket, for a full batch
        self._taken: set[tuple[int, bytes]] = set()  # waiting or in a writer, and so not in the shards yet
        self._folder, self._work = folder, _digest(*recipes)
        self._flips = (False, True) if data.flip else (False,)

    def places(self, rows: range) -> np.ndarray:
        """Where the latents of rows stand, int64 (rows, sides, flips)."""
        own = self.hashes.rows[rows.start : rows.stop]
        buckets = self._buckets.of_row[rows.start : rows.stop]
        found = np.full((*own.shape[:2], len(self._flips)), -1, np.int64)
        for bucket in np.unique(buckets):
            at = np.flatnonzero(buckets == bucket)
            sums = own[at].reshape(-1, own.shape[2])
            for number, flip in enumerate(self._flips):
                found[at, :, number] = self._latents[bucket].find(_keys(sums, flip)).reshape(len(at), -1)
        return found

    def missing(self, rows: range) -> np.ndarray:
        """Which rows have an image that is neither stored nor known to be unreadable, bool (rows,)."""
        own = self.hashes.rows[rows.start : rows.stop]
        fine = np.all(self.places(rows) >= 0, axis=2)
        for row, side in zip(*np.nonzero(~fine & own.any(axis=2)), strict=True):
            fine[row, side] = self.unreadable.get(own[row, side].tobytes()) is not None
        return self.wanted[rows.start : rows.stop] & ~np.all(fine, axis=1)

    def bad(self) -> dict[int, str]:
        """What is wrong with the rows that cannot be decoded, in their order."""
        absent = (self.places(range(len(self._dataset))) < 0).any(axis=2) & self.wanted[:, None]
        found: dict[int, str] = {}
        for row, side in zip(*np.nonzero(absent), strict=True):
            if reason := self.unreadable.get(self.hashes.rows[row, side].tobytes()):
                found.setdefault(int(row), reason)
        return found

    def fill(self, claims: Claims, shown: bool) -> None:
        """Encode what is missing, together with others."""
        missing = self.missing(range(len(self._dataset)))
        units = [g for g in self._dataset.pictures.row_groups() if missing[g.rows.start : g.rows.stop].any()]
        if not units:
            return
        sides = len(self._dataset.sides)
        total, left = (sides * int(rows.sum()) for rows in (self.wanted, missing))
        with Bar("latents", total, "images", total - left, shown) as bar:

            def make(number: int) -> None:
                self._refresh()
                self.hashes.refresh(units[number].rows)
                self._encode(units[number])
                rows = missing[units[number].rows.start : units[number].rows.stop]
                bar.advance(sides * int(rows.sum()))

            names = [f"latents {self._work} {unit.shard.first} {unit.rows}" for unit in units]
            share(names, claims, make, lambda: self._due, self._save)
        self._refresh()
        self.hashes.refresh(range(len(self._dataset)))
        self.unreadable.refresh()
        if self.missing(range(len(self._dataset))).any():
            raise RunError(f"{self._folder} lost latents while it was filled; start again")

    @property
    def _due(self) -> bool:
        return any(writer.due for writer in self._writers)

    def _save(self) -> None:
        for bucket, writer in enumerate(self._writers):
            self._make(bucket)
            writer.close()
        self._taken.clear()
        self.unreadable.save()
        self._refresh()

    def _refresh(self) -> None:
        for shards in self._latents:
            shards.refresh()

    def _encode(self, unit: RowGroup) -> None:
        """Encode what a row group lacks, but for a rest that waits for a full batch or for `_save`."""
        lacking = {unit.rows.start + int(row) for row in np.flatnonzero(self.missing(unit.rows))}
        sides = {side: number for number, side in enumerate(self._dataset.sides)}
        for row, side, content in self._dataset.pictures.group_images(unit, lacking) if lacking else ():
            sha, bucket = hashlib.sha256(content).digest(), int(self._buckets.of_row[row])
            self.hashes.rows[row, sides[side]] = np.frombuffer(sha, np.uint8)
            tried = (bucket, sha) in self._taken or self.unreadable.get(sha) is not None
            if not tried and any(self._lacks(bucket, sha, flip) for flip in self._flips):
                self._taken.add((bucket, sha))
                self._waiting[bucket][sha] = content
                if len(self._waiting[bucket]) == images_at_once(self._buckets.sizes[bucket]):
                    self._make(bucket)
                if self._due:
                    self._save()
        self.hashes.note(unit.rows)

    def _make(self, bucket: int) -> None:
        """Encode the images that wait.

        Batches are always full, of repeats if need be: a batch of another size could give other last bits, and then a
        row would depend on what else was missing.
        """
        waiting, self._waiting[bucket] = self._waiting[bucket], {}
        size = self._buckets.sizes[bucket]
        with ThreadPoolExecutor(THREADS) as pool:
            decoded = list(pool.map(lambda content: _pixels(content, size, self._data.crop), waiting.values()))
        good: dict[bytes, Tensor] = {}
        for sha, result in zip(waiting, decoded, strict=True):
            if isinstance(result, BadImage):
                self.unreadable.add(sha, str(result))
            else:
                good[sha] = result
        full = images_at_once(size)
        for flip in self._flips:
            lacking = [sha for sha in good if self._lacks(bucket, sha, flip)]
            if lacking:
                pixels = torch.stack([good[sha] for sha in lacking])
                pixels = torch.cat([pixels, pixels[-1:].expand(full - len(lacking), *pixels.shape[1:])])
                made = _latents(self._backbone, pixels.flip(-1) if flip else pixels, self._data)
                self._writers[bucket].add(_keys(as_keys(lacking), flip), made[: len(lacking)])

    def _lacks(self, bucket: int, sha: bytes, flip: bool) -> bool:
        return bool(self._latents[bucket].find(_keys(as_keys([sha]), flip))[0] < 0)


def _encode_prompts(
    folder: Path,
    recipe: str,
    text: dict[str, Shards],
    claims: Claims,
    dataset: PreferenceDataset,
    backbone: Backbone,
    shown: bool,
) -> None:
    """Encode the prompts that are missing, and the empty one, which guidance and prompt dropout need."""
    wanted = list({"": None} | dataset.captions())
    keys = as_keys([key_of(prompt) for prompt in wanted])

    def missing(numbers: np.ndarray) -> np.ndarray:
        found = [shards.find(keys[numbers]) >= 0 for shards in text.values()]
        return numbers[~np.logical_and.reduce(found)]

    left = missing(np.arange(len(wanted)))
    if not len(left):
        return
    if shown:
        warn_of_cut(backbone, wanted)
    starts = sorted({int(row) // TEXT_BATCH * TEXT_BATCH for row in left})
    units = [np.arange(start, min(start + TEXT_BATCH, len(wanted))) for start in starts]
    writers = {name: TensorWriter(folder, f"text_{name}", recipe, trimmed=True) for name in text}

    def save() -> None:
        for name, writer in writers.items():
            writer.close()
            text[name].refresh()

    with Bar("prompts", len(wanted), "prompts", len(wanted) - len(left), shown) as bar:

        def make(number: int) -> None:
            """Batches are always full, as those of images."""
            for shards in text.values():
                shards.refresh()
            lacking = missing(units[number])
            if len(lacking):
                given = [wanted[row] for row in lacking]
                encoded = backbone.encode_prompts(given + given[-1:] * (TEXT_BATCH - len(given)))
                for name, rows in encoded.items():
                    writers[name].add(keys[lacking], rows[: len(given)])
            bar.advance(int(np.isin(units[number], left).sum()))

        names = [f"text {recipe} {keys[unit[0]].tobytes().hex()}" for unit in units]
        share(names, claims, make, lambda: any(writer.due for writer in writers.values()), save)


def images_at_once(size: Size) -> int:
    """How many images of a size (width, height) are encoded together: fewer of large ones, which take more memory."""
    width, height = size
    return max(1, min(IMAGE_BATCH, PIXELS // (width * height)))


def _latents(backbone: Backbone, pixels: Tensor, data: DataConfig) -> Tensor:
    return backbone.encode_moments(pixels) if data.latents == "moments" else backbone.encode_images(pixels)


def _recipe(vae: str, size: Size, data: DataConfig) -> str:
    """What latents of a size depend on besides their image; a square is named by its side alone."""
    width, height = size
    named = str(width) if width == height else f"{width}x{height}"
    return _digest(vae, named, data.crop, data.latents, "float16", VERSION)


def _pixels(content: bytes, size: Size, crop: str) -> Tensor | BadImage:
    try:
        return to_pixels(decode(content), size, crop)
    except BadImage as error:
        return error


def _keys(shas: np.ndarray, mirrored: bool) -> np.ndarray:
    """The keys of images: their SHA-256 sums, with all bits turned for mirrored ones."""
    return ~shas if mirrored else shas


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
