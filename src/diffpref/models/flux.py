"""FLUX.1-dev and FLUX.1-schnell (Black Forest Labs 2024): FluxTransformer2DModel on latents packed into tokens.

Text is conditioned on as diffusers' FluxPipeline does: T5's last hidden states as tokens, and CLIP's pooled text.
Latents are (rows, C, h, w) everywhere outside `predict`, which packs 2 x 2 of them into a token. FLUX.1-dev takes a
guidance scale as an input, so one forward gives the guided prediction. The parts are loaded when first used.
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
from diffpref.models.flow import even_sigmas, flow_schedule, pack, t5, text_length, unpack
from diffpref.models.network import Network, input_dtype
from diffpref.models.text import TextPart
from diffpref.models.vae import Vae, find_vae
from diffpref.moving import to_device
from diffpref.train.config import ModelConfig
from diffpref.types import Cond, Latents

NETWORK = Network("transformer", "FluxTransformer2DModel", "FluxPipeline")
DEV_TEXT_LENGTH, SCHNELL_TEXT_LENGTH = 512, 256  # tokens of T5 by the two model cards; 512 is the pipeline's limit
SAMPLE_SIZE = 128  # latents a side at which both were trained; no config says so, the pipeline does


@dataclass(kw_only=True)
class Flux(LatentBackbone):
    """The Backbone of FLUX.1.

    Conditioning: {"text": (rows, T5's tokens, width), "pooled": (rows, CLIP's width)}. guidance: the scale that goes
    into the network, if it takes one.
    """

    vae: Vae
    clip: TextPart
    t5: TextPart
    network: ClassVar[Network] = NETWORK
    cond_names: ClassVar[tuple[str, ...]] = ("text", "pooled")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Cond:
        """T5's last hidden states and CLIP's pooled text, fp32; see the class for their shapes."""
        text = self.t5.encoder(self.t5.tokens(prompts)).last_hidden_state.float()
        return {"text": text, "pooled": self.clip.encoder(self.clip.tokens(prompts)).pooler_output}

    def overlong(self, prompts: list[str]) -> set[int]:
        """The places of prompts whose ends T5 does not read; CLIP, which only sums up, reads less of any long one."""
        return self.t5.overlong(prompts)

    def predict(self, x_t: Latents, t: Real[Tensor, " rows"], cond: Cond) -> Latents:
        """The transformer's velocity (rows, C, h, w)."""
        dtype = input_dtype(self.net, x_t)
        rows, _, h, w = x_t.shape
        down, across = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(down), down, across], dim=-1).flatten(0, 1)
        tokens = self.net(
            hidden_states=pack(x_t.to(dtype)),
            timestep=t / 1000,
            guidance=None if self.guidance is None else torch.full((rows,), self.guidance, device=x_t.device),
            pooled_projections=cond["pooled"].to(dtype),
            encoder_hidden_states=cond["text"].to(dtype),
            txt_ids=torch.zeros(cond["text"].shape[1], 3, device=x_t.device),
            img_ids=to_device(places.float(), x_t.device),
            return_dict=False,
        )[0]
        return unpack(tokens, h, w)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents; raises UserError for a side that is no multiple of a token's."""
        return self.vae.latent_shape(width, height, patch=2)

    @property
    def resolution(self) -> int:
        """The side in pixels at which the network was trained."""
        return SAMPLE_SIZE * self.vae.shrink

    def identity(self) -> dict[str, str]:
        """What latents (`vae`) and text embeddings (`text`) depend on: hashes of weights, and the text's length."""
        return {
            "vae": self.vae.identity(),
            "text": f"{self.clip.identity()} {self.t5.identity()} {self.t5.length}",
        }

    def sigmas(self, steps: int) -> list[float] | None:
        """Even steps from 1 down to 1 / steps."""
        return even_sigmas(steps)

    def guide(self, empty: Tensor, told: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of predictions (rows, C, h, w): for FLUX.1-schnell, which embeds no scale."""
        return empty + scale * (told - empty)


def load(model: ModelConfig, device: torch.device, weights: torch.dtype, trainable: bool) -> Flux:
    """Load the family's Backbone from `model.pretrained` with its overrides.

    The transformer is fp32 if all of it trains, else in the dtype `weights`, with fp32 adapters.
    Raises UserError where a part is missing or does not fit.
    """
    pipeline = folder.resolve(model.pretrained, model.revision)
    vae, clip = find_vae(model, pipeline, device), TextPart(pipeline, "", device)
    scheduler_config = folder.read_json(folder.component(pipeline, "scheduler") / "scheduler_config.json")
    schedule = flow_schedule(scheduler_config)
    path = NETWORK.find(model, pipeline)
    sketch = NETWORK.sketch(path)
    dev = sketch.config.guidance_embeds
    if not dev and model.guidance_embedding != 1:
        raise UserError(f"model.guidance_embedding: {model.pretrained} takes no guidance scale as an input")
    length = text_length(model, DEV_TEXT_LENGTH if dev else SCHNELL_TEXT_LENGTH, DEV_TEXT_LENGTH)
    long = t5(pipeline, "_2", device, length)
    _check_fit(sketch.config, vae, clip, long, path)
    net = NETWORK.load(path, sketch, model, device, weights, trainable)
    return Flux(
        net=net,
        schedule=schedule,
        pipeline=pipeline,
        vae=vae,
        scheduler_config=scheduler_config,
        guidance=model.guidance_embedding if dev else None,
        clip=clip,
        t5=long,
    )


def _check_fit(config: Any, vae: Vae, clip: TextPart, long: TextPart, path: Path) -> None:
    """Refuse a transformer of another family or size, whose first forward would fail in the middle of the work."""
    width, pooled = long.config.get("d_model"), clip.config.get("hidden_size")
    if config.joint_attention_dim != width:
        raise UserError(f"{path} takes text of width {config.joint_attention_dim}, but {long.path} gives {width}")
    if config.pooled_projection_dim != pooled:
        raise UserError(
            f"{path} takes pooled text of width {config.pooled_projection_dim}, but {clip.path} gives {pooled}"
        )
    vae.check_channels(config.in_channels // 4, path)
