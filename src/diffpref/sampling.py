"""The sampling loop: from noise to latents with diffusers' own schedulers, one generator for each image.

An image depends on its prompt, its seed and the settings alone, not on what shares its batch, and it is the image
that the plain diffusers pipeline gives for `torch.Generator().manual_seed(seed)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffpref.errors import UserError
from diffpref.types import Backbone, Cond

SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}


@dataclass(frozen=True)
class Sampling:
    """How images are sampled. guidance_scale: 1 or below means no guidance, as in diffusers."""

    sampler: str
    steps: int
    guidance_scale: float


def scheduler_of(sampler: str, config: dict[str, Any]) -> Any:
    """diffusers' scheduler of a sampler's name, on a model's own noise schedule."""
    import diffusers

    return getattr(diffusers, SAMPLERS[sampler]).from_config(config)


@torch.no_grad()
def sample(
    backbone: Backbone, scheduler: Any, prompts: list[str], seeds: list[int], resolution: int, how: Sampling
) -> Tensor:
    """Scaled latents (n, C, h, w) fp32 for n prompts with their seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = backbone.latent_shape(resolution)
    try:
        scheduler.set_timesteps(how.steps, device=backbone.device)
    except ValueError as error:  # more of them than the model was trained with
        raise UserError(f"sampling steps: {' '.join(str(error).split())}") from error
    latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    latents = latents.to(backbone.device) * scheduler.init_noise_sigma
    guided = how.guidance_scale > 1
    cond = backbone.encode_prompts([""] * len(prompts) + prompts if guided else prompts)
    for t in scheduler.timesteps:
        prediction = _predict(backbone, scheduler, latents, t, cond, how.guidance_scale if guided else None)
        latents = scheduler.step(prediction, t, latents, generator=generators, return_dict=False)[0]
    return latents


def _predict(
    backbone: Backbone, scheduler: Any, latents: Tensor, t: Tensor, cond: Cond, guidance_scale: float | None
) -> Tensor:
    copies = 1 if guidance_scale is None else 2
    taken = scheduler.scale_model_input(torch.cat([latents] * copies), t)
    prediction = backbone.predict(taken, t.expand(len(taken)), cond).float()
    if guidance_scale is None:
        return prediction
    empty, told = prediction.chunk(2)
    return empty + guidance_scale * (told - empty)
