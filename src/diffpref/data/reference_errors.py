"""The reference's errors, kept beside the latents: one fp32 number for each row of a batch at each of its draws.

Keys are content, as those of the latent store are: a row's error belongs to its latents (the image's SHA-256, their
recipe, its mirroring, what decides a sample of the posterior), its prompt with the text encoder, and the draw that
decides time and noise. What does not differ from row to row, the reference itself above all, is the recipe in the name
of the shards. So what is kept is never taken for another thing, and whatever run needs the same number finds it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffpref.data.shard import TensorWriter
from diffpref.data.shards import Shards, as_keys
from diffpref.data.store import Store
from diffpref.data.views import View
from diffpref.errors import RunError

KIND = "reference"


@dataclass(frozen=True)
class Asked:
    """A row of a batch: its image's view, its prompt, and the draw of its item."""

    view: View
    prompt: str
    draw: int


@dataclass(frozen=True)
class ReferenceErrors:
    """Errors of one reference on the images of a store."""

    store: Store
    shards: Shards

    def keys(self, rows: list[Asked]) -> np.ndarray:
        """The keys of rows: uint8 (n, 32)."""
        return as_keys([self._key(row) for row in rows])

    def missing(self, rows: list[Asked]) -> np.ndarray:
        """Which rows' errors are not known, bool (n,)."""
        return self.shards.find(self.keys(rows)) < 0

    def of(self, rows: list[Asked]) -> Float[Tensor, " n"]:
        """The errors of rows, (n,) fp32, each checked against its sum. Raises RunError for one that is not there."""
        places = self.shards.find(self.keys(rows))
        if (places < 0).any():
            raise RunError("the reference's errors were not computed for all draws of this run; start again (--resume)")
        return self.shards.at(places).view(torch.float32)

    def add(self, writer: TensorWriter, rows: list[Asked], errors: Float[Tensor, " n"]) -> None:
        """Hand errors to a writer: as their bits, for it would round floats to fp16."""
        writer.add(self.keys(rows), errors.cpu().view(torch.int32))

    def _key(self, row: Asked) -> bytes:
        """Where latents are the posterior's mean, `view.seed` is 0, and stored images are not cropped by chance."""
        view, store = row.view, self.store
        latents = store.latents[int(store.buckets.of_row[view.row])].recipe
        text = " ".join(sorted({shards.recipe for shards in store.text.values()}))
        told = (latents, int(view.mirrored), view.seed, row.draw, text, row.prompt)
        image = store.hashes[view.row, view.side].tobytes()
        return hashlib.sha256(image + "\0".join(map(str, told)).encode()).digest()
