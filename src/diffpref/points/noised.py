"""Points made from clean latents by noise of per-sample draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from diffpref.traits import PlacementTraits

if TYPE_CHECKING:
    from torch import Tensor

    from diffpref.types import Batch, Points, Schedule


@dataclass(frozen=True)
class Paired(PlacementTraits):
    """One time and one noise shared by both images of a pair (Diffusion-DPO, arXiv 2311.12908, eq. 14)."""

    noise_offset: float = 0.0
    """Adds so much of a number that is the same all over a channel to the noise."""
    input_perturbation: float = 0.0
    """Adds so much further noise to the network's input, and not to its target (arXiv 2301.11706)."""
    name: Literal["paired"] = "paired"
    not_negative: ClassVar[tuple[str, ...]] = ("noise_offset", "input_perturbation")

    def __call__(self, batch: Batch, schedule: Schedule) -> Points:
        """Points of 2 n rows for n pairs; raises ValueError if the batch holds single images."""
        if len(batch.latents) != 2 * len(batch.draw):
            raise ValueError(f"paired points need 2 rows an item, not {len(batch.latents)} for {len(batch.draw)}")
        return _noised(batch, schedule, 2, self.noise_offset, self.input_perturbation)


@dataclass(frozen=True)
class Independent(PlacementTraits):
    """One time and one noise for each row: ordinary denoising, as supervised fine-tuning takes it."""

    noise_offset: float = 0.0
    """Adds so much of a number that is the same all over a channel to the noise."""
    input_perturbation: float = 0.0
    """Adds so much further noise to the network's input, and not to its target (arXiv 2301.11706)."""
    name: Literal["independent"] = "independent"
    takes_pairs: ClassVar[bool] = False
    gives_pairs: ClassVar[bool] = False
    not_negative: ClassVar[tuple[str, ...]] = ("noise_offset", "input_perturbation")

    def __call__(self, batch: Batch, schedule: Schedule) -> Points:
        """Points of n rows for n single images; raises ValueError if the batch holds pairs."""
        if len(batch.latents) != len(batch.draw):
            raise ValueError(f"independent points need 1 row an item, not {len(batch.latents)} for {len(batch.draw)}")
        return _noised(batch, schedule, 1, self.noise_offset, self.input_perturbation)


def _noised(batch: Batch, schedule: Schedule, copies: int, offset: float, perturbation: float) -> Points:
    import torch

    from diffpref.draws import generator
    from diffpref.moving import to_device
    from diffpref.types import Points

    shape = batch.latents.shape[1:]

    def drawn(purpose: str, shape: tuple[int, ...]) -> Tensor:
        noises = [torch.randn(shape, generator=generator(draw, purpose)) for draw in batch.draw]
        return to_device(torch.cat([torch.stack(noises)] * copies), batch.latents.device)

    times = torch.stack([schedule.sample_t(generator(draw, "time")) for draw in batch.draw])
    t, noise = to_device(torch.cat([times] * copies), batch.latents.device), drawn("noise", shape)
    if offset:
        noise = noise + offset * drawn("noise offset", (shape[0], 1, 1))
    disturbed = noise + perturbation * drawn("input perturbation", shape) if perturbation else noise
    return Points(
        x_t=schedule.add_noise(batch.latents, disturbed, t),
        t=t,
        target=schedule.target(batch.latents, noise, t),
        cond=batch.cond,
        label=batch.label,
        weight=batch.weight,
    )
