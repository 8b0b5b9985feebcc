"""The sampling loop: from noise to latents with diffusers' own schedulers, one generator for each image.

An image depends on its prompt, its seed and the settings alone, not on what shares its batch, and it is the image
that the plain diffusers pipeline gives for `torch.Generator().manual_seed(seed)`.

Guidance's negative branch is the same network without a prompt, or, for Diffusion-NPO (arXiv 2505.11245),
another network trained on what people dislike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffpref.errors import UserError
from diffpref.schedules import FLOW_SCHEDULER
from diffpref.types import Backbone, Cond

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow": FLOW_SCHEDULER,
}
PATCH = 2  # latents a side of a token, in each family of flows that diffusers has shifted by the number of its tokens


@dataclass(frozen=True)
class Sampling:
    """How images are sampled. guidance_scale: 1 or below means no guidance, as in diffusers.

    A network that takes the scale as an input (FLUX.1-dev) gets it there, whatever it is, and is never run twice.
    """

    sampler: str
    steps: int
    guidance_scale: float


@runtime_checkable
class FlowSampling(Protocol):
    """What the pipelines of rectified flows do each in its own way; a Backbone of such a family says how."""

    def sigmas(self, steps: int) -> list[float] | None:
        """The noise levels before they are shifted, falling from 1; None for those of the scheduler."""
        ...

    def guide(self, empty: Tensor, told: Tensor, scale: float) -> Tensor:
        """Guidance from the predictions without and with a prompt, (rows, C, h, w) each."""
        ...


def samplers_of(config: dict[str, Any]) -> tuple[str, ...]:
    """The samplers of a model with this scheduler_config.json, the usual one first."""
    flow = config.get("_class_name") == FLOW_SCHEDULER
    return tuple(name for name in SAMPLERS if (name == "flow") is flow)


def refuse_sampler(sampler: str, config: dict[str, Any], key: str = "sampler") -> None:
    """Raise UserError, naming the option by `key`, if a model with this scheduler_config.json has no such sampler.

    It needs no weights: a diffusion's samplers on a flow, and the reverse, would only draw noise.
    """
    known = samplers_of(config)
    if sampler not in known:
        kind = "a rectified flow" if known == ("flow",) else "no rectified flow"
        raise UserError(f"{key}: this model is {kind} and has no {sampler!r}; it has: {', '.join(known)}")


def scheduler_of(sampler: str, config: dict[str, Any]) -> Any:
    """diffusers' scheduler of a sampler's name, on a model's own noise schedule; raises as `refuse_sampler` does."""
    import diffusers

    refuse_sampler(sampler, config)
    return getattr(diffusers, SAMPLERS[sampler]).from_config(config)


def set_times(scheduler: Any, backbone: Backbone, steps: int, shape: tuple[int, ...]) -> None:
    """Choose the scheduler's timesteps as the family's pipeline does for latents of `shape` (C, h, w).

    Raises UserError for more steps than a diffusion was trained with.
    """
    options: dict[str, Any] = {}
    if isinstance(backbone, FlowSampling):
        options["sigmas"] = backbone.sigmas(steps)
        if scheduler.config.use_dynamic_shifting:
            options["mu"] = dynamic_shift(scheduler.config, (shape[1] // PATCH) * (shape[2] // PATCH))
    try:
        scheduler.set_timesteps(steps, device=backbone.device, **options)
    except ValueError as error:
        raise UserError(f"sampling steps: {' '.join(str(error).split())}") from error


def dynamic_shift(config: Any, tokens: int) -> float:
    """mu, the logarithm of the shift of an image of so many tokens: a line through the config's two points.

    It is diffusers' calculate_shift; the config gives base_shift at base_image_seq_len and max_shift at
    max_image_seq_len. Larger images lose less to the same noise and are sampled at later times (arXiv 2403.03206,
    section 5.3.2).
    """
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


@torch.no_grad()
def sample(
    backbone: Backbone,
    scheduler: Any,
    prompts: list[str],
    seeds: list[int],
    resolution: int,
    how: Sampling,
    negative: Backbone | None = None,
) -> Tensor:
    """Scaled latents (n, C, h, w) fp32 for n prompts with their seeds.

    negative: whose network predicts guidance's negative branch, from the same empty prompt; its other parts are not
    used. Raises UserError if nothing is guided or the model is of another family.
    """
    guided = how.guidance_scale > 1 and not backbone.embeds_guidance
    if negative is not None:
        _refuse_negative(backbone, negative, guided)
    backbone = backbone.with_guidance(how.guidance_scale)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = backbone.latent_shape(resolution, resolution)
    set_times(scheduler, backbone, how.steps, shape)
    latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    latents = latents.to(backbone.device) * getattr(scheduler, "init_noise_sigma", 1.0)  # flows start from 1
    told = backbone.encode_prompts(prompts)
    empty = backbone.encode_unconditional(len(prompts)) if guided else {}
    both = {name: torch.cat([rows, told[name]]) for name, rows in empty.items()}
    for t in scheduler.timesteps:
        taken = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        if not guided:
            prediction = _predict(backbone, taken, t, told)
        elif negative is None:
            halves = _predict(backbone, torch.cat([taken, taken]), t, both).chunk(2)
            prediction = guide(backbone, *halves, how.guidance_scale)
        else:
            apart = _predict(negative, taken, t, empty), _predict(backbone, taken, t, told)
            prediction = guide(backbone, *apart, how.guidance_scale)
        latents = scheduler.step(prediction, t, latents, generator=generators, return_dict=False)[0]
    return latents


def guide(backbone: Backbone, empty: Tensor, told: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598), or what the family makes of the two predictions (rows, C, h, w)."""
    if isinstance(backbone, FlowSampling):
        return backbone.guide(empty, told, scale)
    return empty + scale * (told - empty)


def _predict(backbone: Backbone, taken: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return backbone.predict(taken, t.expand(len(taken)), cond).float()


def _refuse_negative(backbone: Backbone, negative: Backbone, guided: bool) -> None:
    if backbone.embeds_guidance:
        raise UserError("negative: this network takes its guidance as an input and has no negative branch")
    if not guided:
        raise UserError("negative: without guidance there is no negative branch; set guidance_scale above 1")
    if type(negative) is not type(backbone):
        kinds = f"{type(negative).__name__}, not {type(backbone).__name__}"
        raise UserError(f"negative: the model is a {kinds}")
