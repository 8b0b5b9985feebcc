"""No store: images and prompts are encoded at every step (`data.cache: none`), as the published scripts do.

That is what a random crop needs, and what a set needs whose latents no disk holds. Latents are the posterior's mean as
in the store, so they differ from it by its rounding to fp16 alone. Every image and every prompt is encoded on its own:
in batches, the last bits of a result would depend on what else is in the batch.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffpref.data.buckets import Size
from diffpref.data.choice import refuse_many_bad
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import BadImage, decode
from diffpref.data.measuring import Buckets
from diffpref.data.pixels import to_pixels
from diffpref.data.prompts import warn_of_cut
from diffpref.data.views import View, sampled
from diffpref.errors import RunError
from diffpref.train.config import DataConfig
from diffpref.types import Backbone, Cond

log = logging.getLogger("diffpref")
TEXT_BYTES = 512 * 2**20  # of embeddings that are kept for the next time
JUDGED_FROM = 100  # rows seen before the share of bad ones is judged, where there are as many
THREADS = 4


@dataclass(frozen=True)
class Direct:
    """Latents and text embeddings of a dataset, computed when they are asked for.

    bad: what is wrong with the rows that were asked for and cannot be read; the loader puts others in their place.
    """

    dataset: PreferenceDataset
    backbone: Backbone
    data: DataConfig
    buckets: Buckets
    bad: dict[int, str] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)
    _texts: OrderedDict[str, Cond] = field(default_factory=OrderedDict)

    @property
    def computes(self) -> bool:
        return True

    def read(self, views: list[View]) -> tuple[Tensor, set[int]]:
        """The unscaled latents (n, C, h, w) fp32 of n views, zeros for those that cannot be read, and which these are.

        Raises UserError where more than 5% of the rows seen so far cannot be read, of at least 100 (or of all).
        """
        size = self.buckets.sizes[self.buckets.of([view.row for view in views])]
        contents = [self.dataset.image_bytes(view.row, self.dataset.sides[view.side]) for view in views]
        with ThreadPoolExecutor(THREADS) as pool:
            pixels = list(pool.map(lambda view, content: self._pixels(view, content, size), views, contents))
        latents = torch.zeros(len(views), *self.backbone.latent_shape(*size))
        unreadable = set()
        for number, (view, result) in enumerate(zip(views, pixels, strict=True)):
            self._seen.add(view.row)
            if isinstance(result, BadImage):
                unreadable.add(number)
                if view.row not in self.bad:
                    self.bad[view.row] = str(result)
                    name = self.dataset.ids[view.row]
                    log.warning("row %s cannot be read, another takes its place: %s", name, result)
        refuse_many_bad(self.dataset, self.bad, max(len(self._seen), min(len(self.dataset), JUDGED_FROM)))
        for number, (view, result) in enumerate(zip(views, pixels, strict=True)):
            if isinstance(result, Tensor):
                latents[number] = self._latents(view, result)
        return latents, unreadable

    def prompts(self, prompts: list[str]) -> Cond:
        """Conditioning of n prompts, on the CPU; the last ones are remembered, up to 512 MB of them."""
        rows = [self._text(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in self.backbone.cond_names}

    def warn_of_cut_prompts(self) -> None:
        """Warn of prompts that the text encoder does not read to their ends."""
        warn_of_cut(self.backbone, self.dataset.captions())

    def _pixels(self, view: View, content: bytes, size: Size) -> Tensor | BadImage:
        try:
            pixels = to_pixels(decode(content), size, self.data.crop, view.left, view.top)
        except BadImage as error:
            return error
        return pixels.flip(-1) if view.mirrored else pixels

    def _latents(self, view: View, pixels: Tensor) -> Tensor:
        if self.data.latents == "moments":
            latents = sampled(self.backbone.encode_moments(pixels[None]).float().cpu(), [view])[0]
        else:
            latents = self.backbone.encode_images(pixels[None])[0].float().cpu()
        if not latents.isfinite().all():
            raise RunError(f"the VAE's latents of row {self.dataset.ids[view.row]} are not finite")
        return latents

    def _text(self, prompt: str) -> Cond:
        if prompt in self._texts:
            self._texts.move_to_end(prompt)
            return self._texts[prompt]
        row = {name: part[0].cpu() for name, part in self.backbone.encode_prompts([prompt]).items()}
        row = {name: part.float() if part.is_floating_point() else part for name, part in row.items()}
        self._texts[prompt] = row
        while len(self._texts) * sum(part.nbytes for part in row.values()) > TEXT_BYTES:  # all rows are of one size
            self._texts.popitem(last=False)
        return row
