"""The store of latents and text embeddings: what the VAE and the text encoder say, computed once.

Keys are content: an image's latents belong to its bytes' SHA-256, its flip and the recipe (VAE weights, resolution,
crop, dtype, version of this code); a text embedding to its prompt and the text encoder's weights. So a repeated image
is stored once, another resolution or VAE never reads stale rows, and building makes only what is missing.
Latents are the posterior's mean, unscaled, in fp16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffpref.data.dataset import PairDataset
from diffpref.data.images import BadImage, decode
from diffpref.data.pixels import to_pixels
from diffpref.data.shards import Shards, TensorWriter
from diffpref.errors import UserError
from diffpref.progress import Bar
from diffpref.train.config import DataConfig
from diffpref.types import Backbone, Cond

VERSION = "1"  # raise it when the way from bytes to latents changes
MAX_BAD_SHARE = 0.05
IMAGE_BATCH, TEXT_BATCH = 16, 64


@dataclass(frozen=True)
class Store:
    """Latents and text embeddings of a dataset.

    hashes: for each row the SHA-256 of its chosen and its rejected image, None where one cannot be decoded.
    bad: what is wrong with these rows, by row.
    """

    latents: Shards
    text: dict[str, Shards]
    hashes: list[tuple[str, str] | None]
    bad: dict[int, str]

    def images(self, keys: list[tuple[str, bool]]) -> Tensor:
        """Unscaled latents (n, C, h, w) fp32 of images given as (SHA-256, mirrored)."""
        return self.latents.rows([_image_key(sha, mirrored) for sha, mirrored in keys]).float()

    def prompts(self, prompts: list[str]) -> Cond:
        """Conditioning of n prompts, fp32."""
        keys = [_prompt_key(prompt) for prompt in prompts]
        return {name: shards.rows(keys).float() for name, shards in self.text.items()}


def build_store(folder: Path, dataset: PairDataset, backbone: Backbone, data: DataConfig) -> Store:
    """Encode what the store lacks and open it.

    Rows whose images cannot be decoded are named in `bad`; more than 5% of them raise UserError.
    """
    identity = backbone.identity()
    backbone.latent_shape(data.resolution)  # refuses a resolution that the VAE cannot take
    image_recipe = _digest(identity["vae"], str(data.resolution), data.crop, "mean", "float16", VERSION)[:12]
    text_recipe = _digest(identity["text"], "float16", VERSION)[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        latents = Shards(folder, "latents", image_recipe)
        text = {name: Shards(folder, f"text_{name}", text_recipe) for name in backbone.cond_names}
        hashes, bad = _encode_images(folder, image_recipe, set(latents.place), dataset, backbone, data)
        _encode_prompts(folder, text_recipe, list(text.values()), dataset, backbone)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"data.cache: cannot write {folder}: {error.strerror}") from error
    for shards in (latents, *text.values()):
        shards.refresh()
    return Store(latents, text, hashes, bad)


def _encode_images(
    folder: Path, recipe: str, stored: set[str], dataset: PairDataset, backbone: Backbone, data: DataConfig
) -> tuple[list[tuple[str, str] | None], dict[int, str]]:
    """Encode the images whose keys are not `stored` yet; each row's two hashes, and what is wrong with bad rows."""
    writer = TensorWriter(folder, "latents", recipe)
    flips = (False, True) if data.flip else (False,)
    found: dict[int, dict[str, str]] = {}
    bad: dict[int, str] = {}
    encoded = 0
    with Bar("latents", 2 * len(dataset), "images") as bar, ThreadPoolExecutor(4) as pool:
        for group in _groups(dataset.iter_images(), IMAGE_BATCH):
            fresh: dict[str, bytes] = {}
            owners: dict[str, list[int]] = {}
            for row, side, content in group:
                sha = hashlib.sha256(content).hexdigest()
                found.setdefault(row, {})[side] = sha
                owners.setdefault(sha, []).append(row)
                if any(_image_key(sha, flip) not in stored for flip in flips):
                    fresh[sha] = content
            decoded = dict(zip(fresh, pool.map(lambda c: _pixels(c, data), fresh.values()), strict=True))
            for sha, result in decoded.items():
                if isinstance(result, BadImage):
                    bad.update(dict.fromkeys(owners[sha], str(result)))
            good = {sha: result for sha, result in decoded.items() if isinstance(result, Tensor)}
            if good:
                for flip in flips:
                    pixels = torch.stack(list(good.values()))
                    latents = backbone.encode_images(pixels.flip(-1) if flip else pixels)
                    writer.add([_image_key(sha, flip) for sha in good], latents)
                stored.update(_image_key(sha, flip) for sha in good for flip in flips)
                encoded += len(good)
            bar.advance(len(group), note=f"{encoded} encoded")
        writer.close()
    if len(bad) > MAX_BAD_SHARE * len(dataset):
        row, reason = next(iter(bad.items()))
        raise UserError(
            f"{len(bad)} of {len(dataset)} rows have images that cannot be read (over {MAX_BAD_SHARE:.0%}); "
            f"the first is row {dataset.ids[row]}: {reason}"
        )
    hashes = [None if row in bad else (found[row]["chosen"], found[row]["rejected"]) for row in range(len(dataset))]
    return hashes, bad


def _encode_prompts(folder: Path, recipe: str, present: list[Shards], dataset: PairDataset, backbone: Backbone) -> None:
    """Encode the prompts that are missing, and the empty one, which guidance and prompt dropout need."""
    wanted = dict.fromkeys(["", *dataset.chosen_prompts, *dataset.rejected_prompts])
    missing = [prompt for prompt in wanted if any(_prompt_key(prompt) not in shards for shards in present)]
    writers = {name: TensorWriter(folder, f"text_{name}", recipe) for name in backbone.cond_names}
    if missing:
        with Bar("prompts", len(missing), "prompts") as bar:
            for group in _groups(missing, TEXT_BATCH):
                for name, rows in backbone.encode_prompts(group).items():
                    writers[name].add([_prompt_key(prompt) for prompt in group], rows)
                bar.advance(len(group))
            for writer in writers.values():
                writer.close()


def _pixels(content: bytes, data: DataConfig) -> Tensor | BadImage:
    try:
        return to_pixels(decode(content), data.resolution, data.crop)
    except BadImage as error:
        return error


def _image_key(sha: str, mirrored: bool) -> str:
    return f"{sha}-mirrored" if mirrored else sha


def _prompt_key(prompt: str) -> str:
    return _digest(prompt)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _groups(items: Iterable, size: int) -> Iterator[list]:
    group: list = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
