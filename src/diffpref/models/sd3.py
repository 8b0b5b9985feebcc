"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): SD3Transformer2DModel with three text encoders.

Text is conditioned on as diffusers' StableDiffusion3Pipeline does: the last but one hidden states of both CLIP encoders
side by side, filled up with zeros to T5's width, then T5's states as further tokens; and both pooled texts in a row. A
folder without T5 has zeros in its place. The parts are loaded when first used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Real
from torch import Tensor
from torch.nn.functional import pad

from diffpref.errors import UserError
from diffpref.models import folder
from diffpref.models.backbone import LatentBackbone
from diffpref.models.flow import flow_schedule, freeze_idle, t5, text_length
from diffpref.models.network import Network, input_dtype
from diffpref.models.text import TextPart
from diffpref.models.vae import Vae, find_vae
from diffpref.train.config import ModelConfig
from diffpref.types import Cond, Latents

NETWORK = Network("transformer", "SD3Transformer2DModel", "StableDiffusion3Pipeline")
TEXT_LENGTH, MAX_TEXT_LENGTH = 256, 512  # tokens of T5: what the pipeline reads, and what it can be asked to


@dataclass(kw_only=True)
class StableDiffusion3(LatentBackbone):
    """The Backbone of SD3 and SD3.5.

    Conditioning: {"text": (rows, CLIP's tokens + T5's, width), "pooled": (rows, both CLIP widths)}. Times are in
    (0, 1000], as the network takes them. t5: None if the folder has none. config: the transformer's.
    """

    vae: Vae
    clips: tuple[TextPart, TextPart]
    t5: TextPart | None
    text_length: int
    config: Any
    network: ClassVar[Network] = NETWORK
    cond_names: ClassVar[tuple[str, ...]] = ("text", "pooled")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Cond:
        """What the three text encoders make of the prompts, fp32; see the class for its shapes."""
        told = [clip.encoder(clip.tokens(prompts), output_hidden_states=True) for clip in self.clips]
        short = torch.cat([each.hidden_states[-2] for each in told], dim=-1)
        width = self.config.joint_attention_dim
        if self.t5 is None:
            long = short.new_zeros(len(prompts), self.text_length, width)
        else:
            long = self.t5.encoder(self.t5.tokens(prompts)).last_hidden_state.float()
        text = torch.cat([pad(short, (0, width - short.shape[-1])), long], dim=1)
        return {"text": text, "pooled": torch.cat([each.text_embeds for each in told], dim=-1)}

    def overlong(self, prompts: list[str]) -> set[int]:
        """The places of prompts whose ends no encoder reads: T5, which reads furthest, or CLIP if there is no T5."""
        return (self.t5 or self.clips[0]).overlong(prompts)

    def predict(self, x_t: Latents, t: Real[Tensor, " rows"], cond: Cond) -> Latents:
        """The transformer's velocity (rows, C, h, w)."""
        dtype = input_dtype(self.net, x_t)
        return self.net(
            hidden_states=x_t.to(dtype),
            timestep=t,
            encoder_hidden_states=cond["text"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            return_dict=False,
        )[0]

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents.

        Raises UserError for a side that is no multiple of a token's, or larger than the network has positions for.
        """
        patch, most = self.config.patch_size, self.config.pos_embed_max_size
        shape, limit = self.vae.latent_shape(width, height, patch), most * patch * self.vae.shrink
        if max(width, height) > limit:
            raise UserError(f"resolution: {max(width, height)} is above this network's {limit}")
        return shape

    @property
    def resolution(self) -> int:
        """The side in pixels at which the network was trained."""
        return self.config.sample_size * self.vae.shrink

    def identity(self) -> dict[str, str]:
        """What latents (`vae`) and text embeddings (`text`) depend on: hashes of weights, and the text's length."""
        parts = [part.identity() if part else "none" for part in (*self.clips, self.t5)]
        return {"vae": self.vae.identity(), "text": " ".join([*parts, str(self.text_length)])}

    def sigmas(self, steps: int) -> list[float] | None:
        """None: the scheduler's own noise levels, from its largest to its smallest."""
        return None

    def guide(self, empty: Tensor, told: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of predictions (rows, C, h, w)."""
        return empty + scale * (told - empty)


def load(model: ModelConfig, device: torch.device, weights: torch.dtype, trainable: bool) -> StableDiffusion3:
    """Load the family's Backbone from `model.pretrained` with its overrides.

    The transformer is fp32 if all of it trains, else in the dtype `weights`, with fp32 adapters.
    Raises UserError where a part is missing or does not fit.
    """
    pipeline = folder.resolve(model.pretrained, model.revision)
    length = text_length(model, TEXT_LENGTH, MAX_TEXT_LENGTH)
    vae = find_vae(model, pipeline, device)
    clip_l, clip_g = (TextPart(pipeline, number, device, kind="CLIPTextModelWithProjection") for number in ("", "_2"))
    left_out = folder.read_json(pipeline / "model_index.json").get("text_encoder_3") in (None, [None, None])
    long = None if left_out else t5(pipeline, "_3", device, length)
    scheduler_config = folder.read_json(folder.component(pipeline, "scheduler") / "scheduler_config.json")
    schedule = flow_schedule(scheduler_config)
    path = NETWORK.find(model, pipeline)
    sketch = NETWORK.sketch(path)
    config = sketch.config
    _check_fit(config, vae, (clip_l, clip_g), long, path)
    net = NETWORK.load(path, sketch, model, device, weights, trainable)
    # the last block's text queries ask for text that nobody reads any more
    last = f"transformer_blocks.{config.num_layers - 1}.attn"
    freeze_idle(net, (f"{last}.add_q_proj", f"{last}.norm_added_q"))
    return StableDiffusion3(
        net=net,
        schedule=schedule,
        pipeline=pipeline,
        vae=vae,
        scheduler_config=scheduler_config,
        clips=(clip_l, clip_g),
        t5=long,
        text_length=length,
        config=config,
    )


def _check_fit(config: Any, vae: Vae, clips: tuple[TextPart, TextPart], long: TextPart | None, path: Path) -> None:
    """Refuse a transformer of another family or size, whose first forward would fail in the middle of the work."""
    width, pooled = config.joint_attention_dim, sum(clip.config.get("projection_dim", 0) for clip in clips)
    if long is not None and long.config.get("d_model") != width:
        raise UserError(f"{path} takes text of width {width}, but {long.path} gives {long.config.get('d_model')}")
    side = sum(clip.config.get("hidden_size", 0) for clip in clips)
    if side > width:
        raise UserError(f"{path} takes text of width {width}, but {clips[0].path} and {clips[1].path.name} give {side}")
    if pooled != config.pooled_projection_dim:
        both = f"{clips[0].path} and {clips[1].path.name} give {pooled}"
        raise UserError(f"{path} takes pooled text of width {config.pooled_projection_dim}, but {both}")
    vae.check_channels(config.in_channels, path)
