"""The points at which the policy is examined, made from clean latents by per-sample draws.

torch is imported inside the calls: these records are part of the configuration, and `--help` needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from diffpref.types import Batch, Points, Schedule


@dataclass(frozen=True)
class Paired:
    """One time and one noise shared by both images of a pair (Diffusion-DPO, arXiv 2311.12908, eq. 14)."""

    name: Literal["paired"] = "paired"

    def __call__(self, batch: Batch, schedule: Schedule) -> Points:
        """Points of 2 n rows for n pairs; raises ValueError if the batch holds single images."""
        if len(batch.latents) != 2 * len(batch.draw):
            raise ValueError(f"paired points need 2 rows an item, not {len(batch.latents)} for {len(batch.draw)}")
        return _noised(batch, schedule, copies=2)


@dataclass(frozen=True)
class Independent:
    """One time and one noise for each row: ordinary denoising, as supervised fine-tuning takes it."""

    name: Literal["independent"] = "independent"

    def __call__(self, batch: Batch, schedule: Schedule) -> Points:
        """Points of n rows for n single images; raises ValueError if the batch holds pairs."""
        if len(batch.latents) != len(batch.draw):
            raise ValueError(f"independent points need 1 row an item, not {len(batch.latents)} for {len(batch.draw)}")
        return _noised(batch, schedule, copies=1)


Placement = Paired | Independent


def _noised(batch: Batch, schedule: Schedule, copies: int) -> Points:
    import torch

    from diffpref.draws import generator
    from diffpref.types import Points

    shape = batch.latents.shape[1:]
    times = torch.stack([schedule.sample_t(generator(draw, "time")) for draw in batch.draw])
    noises = torch.stack([torch.randn(shape, generator=generator(draw, "noise")) for draw in batch.draw])

    def for_each_row(drawn: Tensor) -> Tensor:
        return torch.cat([drawn] * copies).to(batch.latents.device)

    t, noise = for_each_row(times), for_each_row(noises)
    return Points(
        x_t=schedule.add_noise(batch.latents, noise, t),
        t=t,
        target=schedule.target(batch.latents, noise, t),
        cond=batch.cond,
        label=batch.label,
        weight=batch.weight,
    )
