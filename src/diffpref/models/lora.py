"""LoRA adapters of any family's network: added by peft, saved and read in the formats that the field's tools share."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from diffpref.errors import UserError, nearest
from diffpref.models import folder
from diffpref.train.config import ModelConfig

log = logging.getLogger("diffpref")
COMFYUI = "comfyui_lora.safetensors"


def add_lora(net: Any, model: ModelConfig) -> None:
    """Put fp32 adapters on the layers named by `model.lora_targets`; raises UserError for a name that fits none."""
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


def save_lora(net: Any, target: Path, pipeline: Any, part: str) -> None:
    """Write the adapters twice: as diffusers' `load_lora_weights` opens them, and under the names that ComfyUI knows.

    In pytorch_lora_weights.safetensors, alpha / rank is multiplied in: what reads the file need not know of alpha.
    pipeline: diffusers' class of the family. part: what it calls the network, "unet" or "transformer".
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = net.peft_config["default"]
    state = get_peft_model_state_dict(net)
    scaled = {name: value * (config.lora_alpha / config.r if "lora_B" in name else 1) for name, value in state.items()}
    layers = convert_state_dict_to_diffusers(scaled) if part == "unet" else scaled
    pipeline.save_lora_weights(target, **{f"{part}_lora_layers": layers}, safe_serialization=True)
    if part == "unet":
        named = _kohya(state, config.lora_alpha)
    else:
        named = {f"{part}.{name}": value for name, value in scaled.items()}
    save_file({name: value.contiguous() for name, value in named.items()}, target / COMFYUI)


def _kohya(state: dict[str, Any], alpha: float) -> dict[str, Any]:
    """A U-Net's adapters under the names of kohya's trainer, each layer with its alpha.

    ComfyUI (comfy/lora.py, model_lora_keys_unet) reads a U-Net's attention layers under these names, with diffusers'
    names of blocks in them, or under diffusers' former ones (`processor.to_q_lora`), but not under today's. The
    transformers of SD3, FLUX and Qwen-Image it reads as diffusers writes them.
    """
    import torch

    named = {}
    for name, value in state.items():
        layer, side = name.removesuffix(".weight").rsplit(".lora_", 1)
        key = f"lora_unet_{layer.replace('.', '_')}"
        named[f"{key}.lora_{'down' if side == 'A' else 'up'}.weight"] = value
        named[f"{key}.alpha"] = torch.tensor(float(alpha))
    return named


def load_lora(net: Any, place: str, pipeline: Any, part: str, scale: float = 1.0) -> None:
    """Fuse LoRA weights (a file, or a folder that holds one), times `scale`, into the network.

    Raises UserError where they do not fit.
    """
    called = "U-Net" if part == "unet" else part
    path = Path(place) / "pytorch_lora_weights.safetensors" if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise UserError(f"model.lora: {path} is not there")
    try:
        unet = {"unet_config": net.config} if part == "unet" else {}  # by which it reads kohya's names of U-Net blocks
        read: Any = pipeline.lora_state_dict(str(path), **unet, use_safetensors=True, return_lora_metadata=True)
        state, alphas, metadata = read if len(read) == 3 else (read[0], None, read[1])
        ours = {name: value for name, value in state.items() if name.startswith(f"{part}.")}
        if len(ours) < len(state):
            others = len(state) - len(ours)
            log.warning("model.lora: %d of %d tensors are not the %s's and are not used", others, len(state), called)
        if ours:
            net.load_lora_adapter(ours, prefix=part, network_alphas=alphas, metadata=metadata)
            net.fuse_lora(lora_scale=scale)
            net.unload_lora()
    except Exception as error:  # another model's layers, a file that is no safetensors
        raise UserError(f"model.lora: {path} does not fit this {called}: {folder.first_line(error)}") from error
    if not ours:
        raise UserError(f"model.lora: {path} holds no LoRA layers of a {called}")
