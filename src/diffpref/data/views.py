"""An image as a batch takes it, and what turns it into latents: the store, or the encoders at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffpref.data.measuring import Buckets
from diffpref.draws import generator
from diffpref.types import Cond


@dataclass(frozen=True)
class View:
    """Of which row and which of its sides (by number), whether mirrored, and where a random crop lies.

    left, top: in [0, 1), the share of the room that the crop has; a crop that is not random ignores them.
    seed: what decides which latents of the posterior are taken; where its mean is taken, nothing does.
    """

    row: int
    side: int
    mirrored: bool = False
    left: float = 0.0
    top: float = 0.0
    seed: int = 0


@runtime_checkable
class Encoded(Protocol):
    """Latents and text embeddings of a dataset, wherever they come from."""

    @property
    def bad(self) -> dict[int, str]:
        """What is wrong with the rows that cannot be read, as far as it is known."""
        ...

    @property
    def buckets(self) -> Buckets:
        """The shapes of its latents, and which row has which."""
        ...

    @property
    def computes(self) -> bool:
        """Whether latents come from a network, which no other work should run beside."""
        ...

    def read(self, views: list[View]) -> tuple[Tensor, set[int]]:
        """The unscaled latents (n, C, h, w) fp32 of n views, on the CPU, and which of these cannot be read.

        Raises ValueError for views of several buckets.
        """
        ...

    def prompts(self, prompts: list[str]) -> Cond:
        """One row of conditioning for each prompt, on the CPU."""
        ...


def sampled(moments: Tensor, views: list[View]) -> Tensor:
    """Latents (n, C, h, w) of the posteriors of views whose means and log variances are `moments` (n, 2 C, h, w)."""
    mean, logvar = moments.chunk(2, dim=1)
    shape = mean.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=generator(view.seed, "posterior")) for view in views])
    return mean + (0.5 * logvar).exp() * noise
