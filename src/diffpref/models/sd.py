"""Stable Diffusion 1.x and 2.x: a UNet2DConditionModel on VAE latents with one CLIP text encoder.

SD2.x differs only in what its folder says: OpenCLIP's text encoder, the velocity as what is predicted, other widths.
The parts are loaded when first used: a run on a finished store never loads the VAE or the text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from diffpref.schedules import from_scheduler_config
from diffpref.train.config import ModelConfig
from diffpref.types import Cond, Latents

NETWORK = Network("unet", "UNet2DConditionModel", "StableDiffusionPipeline")


@dataclass(kw_only=True)
class StableDiffusion(LatentBackbone):
    """The Backbone of Stable Diffusion 1.x and 2.x. Conditioning: {"text": (rows, tokens, width)}."""

    vae: Vae
    text: TextPart
    network: ClassVar[Network] = NETWORK
    cond_names: ClassVar[tuple[str, ...]] = ("text",)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Cond:
        """The text encoder's last hidden states, {"text": (n, tokens, width)} fp32."""
        return {"text": self.text.encoder(self.text.tokens(prompts)).last_hidden_state}

    def overlong(self, prompts: list[str]) -> set[int]:
        """The places of prompts whose ends the text encoder does not read."""
        return self.text.overlong(prompts)

    def predict(self, x_t: Latents, t: Real[Tensor, " rows"], cond: Cond) -> Latents:
        """The U-Net's prediction (rows, C, h, w)."""
        dtype = input_dtype(self.net, x_t)
        return self.net(x_t.to(dtype), t, encoder_hidden_states=cond["text"].to(dtype), return_dict=False)[0]

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents; raises UserError for a side that the VAE cannot halve evenly."""
        return self.vae.latent_shape(width, height)

    @property
    def resolution(self) -> int:
        """The side in pixels at which the network was trained."""
        return self.net.config.sample_size * self.vae.shrink

    def identity(self) -> dict[str, str]:
        """What latents (`vae`) and text embeddings (`text`) depend on: hashes of weights."""
        return {"vae": self.vae.identity(), "text": self.text.identity()}


def load(model: ModelConfig, device: torch.device, weights: torch.dtype, trainable: bool) -> StableDiffusion:
    """Load the family's Backbone from `model.pretrained` with its overrides.

    The U-Net is fp32 if all of it trains, else in the dtype `weights`, with fp32 adapters.
    Raises UserError where a part is missing.
    """
    pipeline = folder.resolve(model.pretrained, model.revision)
    vae, text = find_vae(model, pipeline, device), TextPart(pipeline, "", device)
    scheduler_config = folder.read_json(folder.component(pipeline, "scheduler") / "scheduler_config.json")
    schedule = from_scheduler_config(scheduler_config)
    path = NETWORK.find(model, pipeline)
    sketch = NETWORK.sketch(path)
    _check_fit(sketch.config, vae, text, path)
    net = NETWORK.load(path, sketch, model, device, weights, trainable)
    return StableDiffusion(
        net=net, schedule=schedule, pipeline=pipeline, vae=vae, scheduler_config=scheduler_config, text=text
    )


def _check_fit(config: Any, vae: Vae, text: TextPart, unet: Path) -> None:
    """Refuse a U-Net of another family, whose first forward would fail in the middle of the work."""
    width = text.config.get("hidden_size")
    if config.cross_attention_dim != width:
        raise UserError(f"{unet} takes text of width {config.cross_attention_dim}, but {text.path} gives {width}")
    vae.check_channels(config.in_channels, unet)
