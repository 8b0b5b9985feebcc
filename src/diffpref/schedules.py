"""Noise schedules: of DDPM type, predicting the noise or the velocity, and rectified flow.

DDPM type (Ho et al. 2020, eq. 4), with a = alphas_cumprod[t]: x_t = sqrt(a) x0 + sqrt(1 - a) noise. The velocity is
sqrt(a) noise - sqrt(1 - a) x0 (Salimans and Ho 2022, appendix D). The values agree with diffusers' DDPMScheduler.

Rectified flow (Liu et al. 2022; Esser et al. 2024, arXiv 2403.03206), with s = t / 1000 in (0, 1]:
x_t = (1 - s) x0 + s noise, and the velocity is noise - x0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from diffpref.errors import UserError
from diffpref.moving import to_device
from diffpref.types import Latents, Schedule

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class DiffusionSchedule:
    """alphas_cumprod: (T,) fp32; prediction_type: "epsilon" or "v_prediction"; times: those trained at, None=all."""

    alphas_cumprod: Float[Tensor, " T"]
    prediction_type: str
    times: Int[Tensor, " k"] | None = None

    def sample_t(self, generator: torch.Generator) -> Tensor:
        """One of the times, all equally likely: int64 of shape ()."""
        drawn = torch.randint(
            len(self.alphas_cumprod) if self.times is None else len(self.times), (), generator=generator
        )
        return drawn if self.times is None else self.times[drawn]

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

    def min_snr(self, t: Int[Tensor, " rows"], gamma: float) -> Float[Tensor, " rows"]:
        """min(SNR, gamma) / SNR, for velocities / (SNR + 1) (Hang et al. 2023, arXiv 2303.09556, section 3.4).

        Written with a and gamma (1 - a) instead of SNR = a / (1 - a), so that a of 0 gives 1 and 0 instead of NaN.
        """
        kept = to_device(self.alphas_cumprod, t.device)[t]
        least = torch.minimum(kept, gamma * (1 - kept))  # min(SNR, gamma) (1 - a)
        if self.prediction_type == "epsilon":
            return torch.where(kept > 0, least / kept.clamp_min(torch.finfo(kept.dtype).tiny), 1.0)
        return least

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        kept = to_device(self.alphas_cumprod, like.device)[t].reshape(-1, *[1] * (like.ndim - 1))
        return kept.sqrt(), (1 - kept).sqrt()


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow with logit-normal times of mean 0 and deviation 1 (arXiv 2403.03206, eq. 19), then shifted.

    shift: a of s -> a s / (1 + (a - 1) s), the resolution's share of later times (there, eq. 23); 1 changes nothing.
    So the logit of s is normal with mean log a. diffusers' SD3 scripts draw the same times, rounded up to thousandths
    before the shift; its FLUX and Qwen-Image scripts draw even ones unless told `--weighting_scheme logit_normal`.
    """

    shift: float = 1.0

    def sample_t(self, generator: torch.Generator) -> Tensor:
        """A time in (0, 1000): fp32 of shape ()."""
        s = torch.sigmoid(torch.randn((), generator=generator))
        return 1000 * self.shift * s / (1 + (self.shift - 1) * s)

    def add_noise(self, x0: Latents, noise: Latents, t: Real[Tensor, " rows"]) -> Latents:
        """x_t for clean latents and noise (rows, C, H, W) at times (rows,)."""
        s = _share(t, x0)
        return (1 - s) * x0 + s * noise

    def target(self, x0: Latents, noise: Latents, t: Real[Tensor, " rows"]) -> Latents:
        """What the network should predict: the velocity from data to noise."""
        return noise - x0

    def to_x0(self, x_t: Latents, prediction: Latents, t: Real[Tensor, " rows"]) -> Latents:
        """The clean latents that a velocity at x_t implies."""
        return x_t - _share(t, x_t) * prediction

    def min_snr(self, t: Real[Tensor, " rows"], gamma: float) -> Float[Tensor, " rows"]:
        """Raises UserError: min-SNR weights are of the DDPM type."""
        raise UserError("train.snr_gamma: min-SNR weights are defined for epsilon and v_prediction, not for flows")


def _share(t: Tensor, like: Tensor) -> Tensor:
    return (t.to(like.device, torch.float32) / 1000).reshape(-1, *[1] * (like.ndim - 1))


def from_scheduler_config(config: dict[str, Any]) -> Schedule:
    """The schedule that a pipeline folder's scheduler_config.json names, through diffusers' own beta tables.

    A flow whose shift depends on the resolution (FLUX.1-dev, Qwen-Image) is trained without one, as diffusers' own
    scripts do: the shift says where samplers step, and how times were drawn in training is not published.
    Raises UserError for another prediction type than epsilon, v_prediction or a flow's.
    """
    from diffusers import DDPMScheduler

    if config.get("_class_name") == FLOW_SCHEDULER:
        return FlowSchedule(1.0 if config.get("use_dynamic_shifting") else config.get("shift", 1.0))
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"the model's scheduler predicts {kind!r}; only epsilon and v_prediction are supported")
    try:
        scheduler: Any = DDPMScheduler.from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"the model's scheduler_config.json cannot be used: {error}") from error
    return DiffusionSchedule(scheduler.alphas_cumprod, kind)
