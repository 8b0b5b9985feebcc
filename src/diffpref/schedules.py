"""Noise schedules of DDPM type (Ho et al. 2020, eq. 4), predicting the noise or the velocity.

With a = alphas_cumprod[t]: x_t = sqrt(a) x0 + sqrt(1 - a) noise. The velocity is sqrt(a) noise - sqrt(1 - a) x0
(Salimans and Ho 2022, appendix D). The values agree with diffusers' DDPMScheduler, which the tests compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffpref.errors import UserError
from diffpref.types import Latents


@dataclass(frozen=True)
class DiffusionSchedule:
    """alphas_cumprod: (T,) fp32; prediction_type: "epsilon" or "v_prediction"."""

    alphas_cumprod: Float[Tensor, " T"]
    prediction_type: str

    def sample_t(self, generator: torch.Generator) -> Tensor:
        """One of the T times, all equally likely: int64 of shape ()."""
        return torch.randint(len(self.alphas_cumprod), (), generator=generator)

    def add_noise(self, x0: Latents, noise: Latents, t: Int[Tensor, " rows"]) -> Latents:
        """x_t for clean latents and noise (rows, C, H, W) at times (rows,)."""
        signal, spread = self._coefficients(t, x0)
        return signal * x0 + spread * noise

    def target(self, x0: Latents, noise: Latents, t: Int[Tensor, " rows"]) -> Latents:
        """What the network should predict: the noise, or the velocity."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._coefficients(t, x0)
        return signal * noise - spread * x0

    def to_x0(self, x_t: Latents, prediction: Latents, t: Int[Tensor, " rows"]) -> Latents:
        """The clean latents that a prediction at x_t implies."""
        signal, spread = self._coefficients(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - spread * prediction) / signal
        return signal * x_t - spread * prediction

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod.to(like.device)[t].reshape(-1, *[1] * (like.ndim - 1))
        return kept.sqrt(), (1 - kept).sqrt()


def from_scheduler_config(config: dict[str, Any]) -> DiffusionSchedule:
    """The schedule that a pipeline folder's scheduler_config.json names, through diffusers' own beta tables."""
    from diffusers import DDPMScheduler

    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"the model's scheduler predicts {kind!r}; only epsilon and v_prediction are supported")
    try:
        scheduler: Any = DDPMScheduler.from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"the model's scheduler_config.json cannot be used: {error}") from error
    return DiffusionSchedule(scheduler.alphas_cumprod, kind)
