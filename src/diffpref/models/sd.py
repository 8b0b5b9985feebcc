"""Stable Diffusion 1.x and 2.x: a UNet2DConditionModel on VAE latents with one CLIP text encoder.

The parts are loaded when first used: a run on a finished store never loads the VAE or the text encoder.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Real
from torch import Tensor

from diffpref.errors import UserError, nearest
from diffpref.models import folder
from diffpref.schedules import DiffusionSchedule, from_scheduler_config
from diffpref.train.config import ModelConfig
from diffpref.types import Cond, Latents

log = logging.getLogger("diffpref")


@dataclass
class Parts:
    """What stands around the U-Net, frozen, each loaded on first use, in fp32.

    Half precision would save little: the VAE overflows in fp16, and text takes 0.2% of a step's work. And so the
    store's rows serve runs of any precision.
    """

    pipeline: Path
    vae_folder: Path
    device: torch.device
    vae_config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.vae_config = folder.read_json(self.vae_folder / "config.json")
        self.text_folder = folder.component(self.pipeline, "text_encoder")
        self.tokenizer_folder = folder.component(self.pipeline, "tokenizer")

    @cached_property
    def vae(self) -> Any:
        from diffusers import AutoencoderKL

        loaded = _load(AutoencoderKL, self.vae_folder, torch_dtype=torch.float32)
        return loaded.to(self.device).eval().requires_grad_(False)

    @cached_property
    def text_encoder(self) -> Any:
        from transformers import CLIPTextModel

        loaded = _load(CLIPTextModel, self.text_folder, torch_dtype=torch.float32)
        return loaded.to(self.device).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return _load(CLIPTokenizer, self.tokenizer_folder)

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        return folder.read_json(folder.component(self.pipeline, "scheduler") / "scheduler_config.json")


@dataclass
class StableDiffusion:
    """The Backbone of Stable Diffusion 1.x and 2.x. Conditioning: {"text": (rows, tokens, width)}."""

    net: Any
    schedule: DiffusionSchedule
    parts: Parts
    cond_names: ClassVar[tuple[str, ...]] = ("text",)

    def with_net(self, net: Any) -> StableDiffusion:
        """The same family with another network: a copy, or a wrapped one."""
        return replace(self, net=net)

    @property
    def device(self) -> torch.device:
        return self.parts.device

    @torch.no_grad()
    def encode_images(self, pixels: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Unscaled mean latents (n, C, h, w) fp32 of pixels (n, 3, H, W) in [-1, 1]."""
        return self.parts.vae.encode(pixels.to(self.device, torch.float32)).latent_dist.mean

    def scale_latents(self, latents: Tensor) -> Tensor:
        return latents * self.parts.vae_config.get("scaling_factor", 0.18215)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Pixels (n, 3, H, W) fp32 in [0, 1] of scaled latents."""
        unscaled = latents.to(self.device, torch.float32) / self.parts.vae_config.get("scaling_factor", 0.18215)
        return (self.parts.vae.decode(unscaled).sample / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Cond:
        """The text encoder's last hidden states, {"text": (n, tokens, width)} fp32."""
        tokenizer = self.parts.tokenizer
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return {"text": self.parts.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state}

    def predict(self, x_t: Latents, t: Real[Tensor, " rows"], cond: Cond) -> Latents:
        """The U-Net's prediction (rows, C, h, w)."""
        dtype = next(self.net.parameters()).dtype if not torch.is_autocast_enabled(x_t.device.type) else x_t.dtype
        return self.net(x_t.to(dtype), t, encoder_hidden_states=cond["text"].to(dtype), return_dict=False)[0]

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image's latents; raises UserError for a side that the VAE cannot halve evenly."""
        shrink = 2 ** (len(self.parts.vae_config["block_out_channels"]) - 1)
        if resolution % shrink:
            raise UserError(f"resolution: {resolution} is no multiple of the VAE's {shrink}")
        return self.parts.vae_config["latent_channels"], resolution // shrink, resolution // shrink

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The pipeline's scheduler_config.json, for samplers."""
        return self.parts.scheduler_config

    @property
    def resolution(self) -> int:
        """The side in pixels at which the network was trained."""
        shrink = 2 ** (len(self.parts.vae_config["block_out_channels"]) - 1)
        return self.net.config.sample_size * shrink

    def identity(self) -> dict[str, str]:
        """What latents (`vae`) and text embeddings (`text`) depend on: hashes of weights."""
        encoder, tokenizer = (folder.weights_hash(p) for p in (self.parts.text_folder, self.parts.tokenizer_folder))
        return {"vae": folder.weights_hash(self.parts.vae_folder), "text": f"{encoder} {tokenizer}"}

    def save(self, target: Path, lora: bool) -> None:
        """Write `target` as plain diffusers opens it: the whole pipeline with this U-Net, or its LoRA weights."""
        if lora:
            _save_lora(self.net, target)
            return
        folder.copy_pipeline(self.parts.pipeline, target, without={"unet", "vae"})
        folder.copy_part(self.parts.vae_folder, target / "vae")
        self.net.save_pretrained(target / "unet")


def load(model: ModelConfig, device: torch.device, weights: torch.dtype, trainable: bool) -> StableDiffusion:
    """Load the family's Backbone from `model.pretrained` with its overrides.

    The U-Net is fp32 if all of it trains, else in the dtype `weights`, with fp32 adapters.
    Raises UserError where a part is missing.
    """
    from diffusers import UNet2DConditionModel

    pipeline = folder.resolve(model.pretrained, model.revision)
    vae = folder.override(model.vae, "vae") if model.vae else folder.component(pipeline, "vae")
    parts = Parts(pipeline, vae, device)
    schedule = from_scheduler_config(parts.scheduler_config)
    unet = folder.override(model.unet, "unet") if model.unet else folder.component(pipeline, "unet")
    full = trainable and model.lora_rank == 0
    net = _load(UNet2DConditionModel, unet, torch_dtype=torch.float32 if full else weights).to(device)
    _check_fit(net.config, parts, unet)
    if model.lora:
        _load_lora(net, model.lora)
    net.requires_grad_(full)  # after fusing, which freezes what it touches
    if trainable and model.lora_rank:
        _add_lora(net, model)
    return StableDiffusion(net, schedule, parts)


def _load(kind: Any, path: Path, **options: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():  # diffusers 0.42 calls the argument dtype, 0.38 torch_dtype
            warnings.simplefilter("ignore", FutureWarning)
            return kind.from_pretrained(path, **options)
    except Exception as error:  # each kind of part and of damage raises its own
        raise UserError(f"{path} does not load as a {kind.__name__}: {folder.first_line(error)}") from error


def _check_fit(config: Any, parts: Parts, unet: Path) -> None:
    """Refuse a U-Net of another family, whose first forward would fail in the middle of the work."""
    width = folder.read_json(parts.text_folder / "config.json").get("hidden_size")
    channels = parts.vae_config["latent_channels"]
    if config.cross_attention_dim != width:
        raise UserError(
            f"{unet} takes text of width {config.cross_attention_dim}, but {parts.text_folder} gives {width}"
        )
    if config.in_channels != channels:
        raise UserError(f"{unet} takes {config.in_channels} channels, but {parts.vae_folder} gives {channels}")


def _add_lora(net: Any, model: ModelConfig) -> None:
    from peft import LoraConfig

    layers = {name for name, _ in net.named_modules()}
    for target in model.lora_targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise UserError(f"model.lora_targets: no layer is called {target!r}: {nearest(target, _endings(layers))}")
    config = LoraConfig(
        r=model.lora_rank,
        lora_alpha=model.lora_alpha or model.lora_rank,
        target_modules=list(model.lora_targets),
        init_lora_weights="gaussian",
    )
    try:
        net.add_adapter(config)
    except ValueError as error:
        raise UserError(f"model.lora_targets: {folder.first_line(error)}") from error
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _endings(layers: set[str]) -> set[str]:
    """How layers may be called: by their last name, with the one before where the last is a number."""
    split = [name.split(".") for name in layers if name]
    return {".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]) for parts in split}


def _save_lora(net: Any, target: Path) -> None:
    """Write the adapters with alpha / rank multiplied in: what reads the file need not know of alpha."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    config = net.peft_config["default"]
    scale = config.lora_alpha / config.r
    state = {
        name: value * scale if "lora_B" in name else value for name, value in get_peft_model_state_dict(net).items()
    }
    layers = convert_state_dict_to_diffusers(state)
    StableDiffusionPipeline.save_lora_weights(target, unet_lora_layers=layers, safe_serialization=True)


def _load_lora(net: Any, place: str) -> None:
    from diffusers import StableDiffusionPipeline

    path = Path(place) / "pytorch_lora_weights.safetensors" if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise UserError(f"model.lora: {path} is not there")
    try:
        read: Any = StableDiffusionPipeline.lora_state_dict(
            str(path), unet_config=net.config, use_safetensors=True, return_lora_metadata=True
        )
        state, alphas, metadata = read
        ours = {name: value for name, value in state.items() if name.startswith("unet.")}
        if len(ours) < len(state):
            log.warning(
                "model.lora: %d of %d tensors are not the U-Net's and are not used", len(state) - len(ours), len(state)
            )
        if ours:
            net.load_lora_adapter(ours, prefix="unet", network_alphas=alphas, metadata=metadata)
            net.fuse_lora()
            net.unload_lora()
    except Exception as error:  # another model's layers, a file that is no safetensors
        raise UserError(f"model.lora: {path} does not fit this U-Net: {folder.first_line(error)}") from error
    if not ours:
        raise UserError(f"model.lora: {path} holds no LoRA layers of a U-Net")
