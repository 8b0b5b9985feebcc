"""Pipeline folders of the true architectures of SD1.5 and SDXL with random weights, from their published configs.

`width` scales the channels of all parts for machines that want less; the proportions stay those of the model.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffpref.embedded.build.base import make_tokenizer

GROUPS, HEAD = 32, 64  # of group norms; the width of an attention head
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_sd15(folder: Path, width: float = 1.0) -> Path:
    """Write Stable Diffusion 1.5."""
    torch.manual_seed(0)
    text = _text(768, 12, width)
    pipeline = StableDiffusionPipeline(
        vae=_vae(512, 0.18215, width),
        text_encoder=CLIPTextModel(text),
        tokenizer=_tokenizer(folder / "tokenizer"),
        unet=UNet2DConditionModel(
            sample_size=64,
            block_out_channels=_channels(width, 320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=text.hidden_size,
            attention_head_dim=8,
        ),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_sdxl(folder: Path, width: float = 1.0) -> Path:
    """Write SDXL's base model."""
    torch.manual_seed(0)
    first, second = _text(768, 12, width), _text(1280, 32, width)
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(1024, 0.13025, width),
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=_tokenizer(folder / "tokenizer"),
        tokenizer_2=_tokenizer(folder / "tokenizer_2"),
        unet=UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=_channels(width, 320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[count // HEAD or 1 for count in _channels(width, 320, 640, 1280)],
            cross_attention_dim=first.hidden_size + second.hidden_size,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=6 * 256 + second.projection_dim,
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    )
    pipeline.save_pretrained(folder)
    return folder


def _channels(width: float, *full: int) -> tuple[int, ...]:
    return tuple(max(1, round(count * width / GROUPS)) * GROUPS for count in full)


def _vae(side: int, factor: float, width: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=_channels(width, 128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=side,
        scaling_factor=factor,
    )


def _text(hidden: int, layers: int, width: float) -> CLIPTextConfig:
    heads = max(1, round(hidden * width / HEAD))
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=heads * HEAD,
        intermediate_size=4 * heads * HEAD,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        projection_dim=heads * HEAD,
    )


def _tokenizer(folder: Path) -> Any:
    tokenizer = make_tokenizer(folder)
    tokenizer.model_max_length = 77
    return tokenizer
