"""Stable Diffusion XL: a U-Net on VAE latents with two CLIP text encoders, a pooled text and time ids.

Podell et al. 2023, arXiv 2307.01952. Base, turbo and refiner differ in their times and time ids, as in the published
train.py of Diffusion-DPO (SalesforceAIResearch/DiffusionDPO): turbo is trained at four times of a schedule whose last
time has no signal left (Sauer et al. 2023, arXiv 2311.17042; Lin et al. 2023, arXiv 2305.08891), the refiner at times
below 200 with an aesthetic score of 6 among its time ids. The parts are loaded when first used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Real
from torch import Tensor

from diffpref.errors import UserError
from diffpref.models import folder
from diffpref.models.backbone import LatentBackbone
from diffpref.models.network import Network, input_dtype
from diffpref.models.text import TextPart
from diffpref.models.vae import Vae, find_vae
from diffpref.moving import on_device
from diffpref.schedules import DiffusionSchedule, from_scheduler_config
from diffpref.train.config import ModelConfig
from diffpref.types import Cond, Latents, Schedule

NETWORK = Network("unet", "UNet2DConditionModel", "StableDiffusionXLPipeline")
TIMES = {"turbo": range(249, 1000, 250), "refiner": range(200)}  # of 1000; `base` has all
AESTHETIC_SCORE = 6.0


@dataclass(kw_only=True)
class StableDiffusionXL(LatentBackbone):
    """The Backbone of SDXL. Conditioning: {"text": (rows, tokens, width), "pooled": (rows, pooled width)}.

    texts: the text encoders, of which the last gives the pooled text; the refiner has that one alone.
    aesthetic: whether the time ids end with an aesthetic score, the refiner's, instead of the target size.
    """

    vae: Vae
    texts: tuple[TextPart, ...]
    aesthetic: bool
    network: ClassVar[Network] = NETWORK
    cond_names: ClassVar[tuple[str, ...]] = ("text", "pooled")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Cond:
        """All encoders' last but one hidden states side by side, and the last encoder's projected text, fp32.

        The empty prompt is encoded like any other, and so a dropped prompt in training is what the published script
        trains with. Guidance's unconditional branch is another matter: `encode_unconditional`.
        """
        outputs = [part.encoder(part.tokens(prompts), output_hidden_states=True) for part in self.texts]
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"text": text, "pooled": outputs[-1].text_embeds}

    def overlong(self, prompts: list[str]) -> set[int]:
        """The places of prompts whose ends at least one text encoder does not read."""
        return set().union(*(part.overlong(prompts) for part in self.texts))

    def predict(self, x_t: Latents, t: Real[Tensor, " rows"], cond: Cond) -> Latents:
        """The U-Net's prediction (rows, C, h, w), told that the images are of this very size and not cropped."""
        dtype = input_dtype(self.net, x_t)
        added = {"text_embeds": cond["pooled"].to(dtype), "time_ids": self._time_ids(x_t)}
        text = cond["text"].to(dtype)
        return self.net(x_t.to(dtype), t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    def _time_ids(self, x_t: Tensor) -> Tensor:
        """(rows, 6) or (rows, 5) fp32: the original size, the crop's corner, and the target size or a score."""
        size = [side * self.vae.shrink for side in x_t.shape[-2:]]
        ids = [*size, 0, 0, *([AESTHETIC_SCORE] if self.aesthetic else size)]
        return on_device(ids, x_t.device, torch.float32).expand(len(x_t), -1)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents; raises UserError for a side that the VAE cannot halve evenly."""
        return self.vae.latent_shape(width, height)

    @property
    def resolution(self) -> int:
        """The side in pixels at which the network was trained."""
        return self.net.config.sample_size * self.vae.shrink

    def identity(self) -> dict[str, str]:
        """What latents (`vae`) and text embeddings (`text`) depend on: hashes of weights."""
        return {"vae": self.vae.identity(), "text": " ".join(part.identity() for part in self.texts)}


def load(model: ModelConfig, device: torch.device, weights: torch.dtype, trainable: bool) -> StableDiffusionXL:
    """Load the family's Backbone from `model.pretrained` with its overrides, for the times of `model.variant`.

    The U-Net is fp32 if all of it trains, else in the dtype `weights`, with fp32 adapters.
    Raises UserError where a part is missing.
    """
    pipeline = folder.resolve(model.pretrained, model.revision)
    index = folder.read_json(pipeline / "model_index.json")
    vae, texts = find_vae(model, pipeline, device), _texts(index, pipeline, device)
    scheduler_config = folder.read_json(folder.component(pipeline, "scheduler") / "scheduler_config.json")
    schedule = _schedule(scheduler_config, model.variant)
    aesthetic = bool(index.get("requires_aesthetics_score"))
    path = NETWORK.find(model, pipeline)
    sketch = NETWORK.sketch(path)
    _check_fit(sketch.config, vae, texts, 5 if aesthetic else 6, path)
    net = NETWORK.load(path, sketch, model, device, weights, trainable)
    zeros = bool(index.get("force_zeros_for_empty_prompt", True))  # diffusers' default
    return StableDiffusionXL(
        net=net,
        schedule=schedule,
        pipeline=pipeline,
        vae=vae,
        scheduler_config=scheduler_config,
        zeros=zeros,
        texts=texts,
        aesthetic=aesthetic,
    )


def _texts(index: dict[str, Any], pipeline: Path, device: torch.device) -> tuple[TextPart, ...]:
    second = TextPart(pipeline, "_2", device, kind="CLIPTextModelWithProjection")
    if index.get("text_encoder") in (None, [None, None]):
        return (second,)
    return TextPart(pipeline, "", device), second


def _schedule(config: dict[str, Any], variant: str) -> Schedule:
    """The folder's schedule at the variant's times; turbo's with zero terminal SNR."""
    if str(config.get("_class_name")).startswith("EDM"):
        raise UserError(f"the model's scheduler is an {config['_class_name']}; EDM's noise levels are not supported")
    if variant == "base":
        return from_scheduler_config(config)
    schedule = from_scheduler_config({**config, "rescale_betas_zero_snr": variant == "turbo"})
    if not isinstance(schedule, DiffusionSchedule):
        raise UserError(f"model.variant: {variant} needs a schedule of DDPM type, and the model's is a flow")
    return replace(schedule, times=torch.tensor(TIMES[variant]))


def _check_fit(config: Any, vae: Vae, texts: tuple[TextPart, ...], time_ids: int, unet: Path) -> None:
    """Refuse a U-Net of another family, whose first forward would fail in the middle of the work."""
    width = sum(part.config.get("hidden_size", 0) for part in texts)
    if config.cross_attention_dim != width:
        raise UserError(f"{unet} takes text of width {config.cross_attention_dim}, but the text encoders give {width}")
    vae.check_channels(config.in_channels, unet)
    if config.addition_embed_type != "text_time":
        raise UserError(f"{unet} takes no pooled text and time ids; it is not of SDXL")
    taken = config.projection_class_embeddings_input_dim
    given = time_ids * config.addition_time_embed_dim + texts[-1].config.get("projection_dim", 0)
    if taken != given:
        raise UserError(f"{unet} takes {taken} numbers of pooled text and time ids, but the pipeline gives {given}")
