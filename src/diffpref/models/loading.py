"""From a model's configuration to its Backbone, on the device and in the precision that are there."""

import importlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffpref.errors import UserError, nearest
from diffpref.models import folder
from diffpref.train.config import ModelConfig
from diffpref.types import Backbone

log = logging.getLogger("diffpref")

FAMILIES = {  # diffusers' pipeline class -> module of diffpref.models
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "QwenImagePipeline": "qwenimage",
}
SMALL_NETWORK = 50_000_000  # parameters
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU; of several GPUs each rank of torchrun and each worker has its own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = os.environ.get("LOCAL_RANK", os.environ.get("DIFFPREF_WORKER", "0"))  # the latter of data.engine
    return torch.device("cuda", int(number) % torch.cuda.device_count())


def weights_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """The dtype of weights that do not train; raises UserError for fp16 on a CPU, which fails only in the forward."""
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("mixed_precision: fp16 does not run on a CPU; use bf16 or no")
    return DTYPES[mixed_precision]


def load_backbone(model: ModelConfig, device: torch.device, weights: torch.dtype, trainable: bool) -> Backbone:
    """The Backbone of the pipeline's family, in the precision asked for.

    Raises UserError as `check_model` does, and where a part does not load.
    """
    family = check_model(model, trainable)
    backbone = importlib.import_module(f"diffpref.models.{family}").load(model, device, weights, trainable)
    if device.type == "cpu":
        _choose_threads(backbone.net)
    return backbone


def load_negative(
    model: ModelConfig, tuned: Backbone, place: str, merge_weight: float, weights: torch.dtype
) -> Backbone:
    """What guides from the other side of `tuned`, the Backbone of `model`: another pipeline, or LoRA weights on it.

    LoRA weights n stand upon the tuned weights t, of which `merge_weight` w can be taken back to the base's b:
    b + (1 - w)(t - b) + n, as in Diffusion-NPO (ICLR 2025, OpenReview iJi7nz5Cxc; `merge_weight` of its gen_xl.py).
    Raises UserError where the weights do not fit, and for a merge weight with another pipeline.
    """
    path = Path(place)
    if not path.is_file() and not (path / "pytorch_lora_weights.safetensors").is_file():
        if merge_weight:
            raise UserError(f"--merge-weight: it is for LoRA weights, and {place} holds none")
        return load_backbone(ModelConfig(place), tuned.device, weights, trainable=False)
    scales = (*(model.lora_scales or [1.0] * len(model.lora)), 1.0)
    stacked = replace(model, lora=(*model.lora, place), lora_scales=scales)
    negative = load_backbone(stacked, tuned.device, weights, trainable=False)
    if merge_weight:
        base = load_backbone(ModelConfig(model.pretrained), tuned.device, weights, trainable=False)
        with torch.no_grad():
            for name, value in negative.net.named_parameters():
                value.add_(base.net.get_parameter(name) - tuned.net.get_parameter(name), alpha=merge_weight)
    return negative


def check_model(model: ModelConfig, trainable: bool) -> str:
    """The family, after refusing what JSON files alone show cannot work.

    Raises UserError for an unknown family, for a variant that the pipeline is not, and for settings it has no use for.
    """
    pipeline = folder.resolve(model.pretrained, model.revision)
    family = family_of(pipeline)
    check_variant(model, pipeline, family, trainable)
    _check_settings(model, family)
    return family


def family_of(pipeline: Path) -> str:
    """The module of diffpref.models for a pipeline folder, by the class that its model_index.json names."""
    index = pipeline / "model_index.json"
    if not index.is_file():
        raise UserError(f"{pipeline} is no diffusers pipeline folder: it has no model_index.json")
    kind = folder.read_json(index).get("_class_name")
    if kind not in FAMILIES:
        raise UserError(f"{index}: {kind} is of no family that diffpref knows: {nearest(str(kind), FAMILIES)}")
    return FAMILIES[kind]


def scheduler_config_of(pretrained: str, revision: str | None = None) -> dict[str, Any]:
    """A pipeline's scheduler_config.json, by which samplers are chosen and refused before weights are loaded."""
    pipeline = folder.resolve(pretrained, revision)
    return folder.read_json(folder.component(pipeline, "scheduler") / "scheduler_config.json")


def _check_settings(model: ModelConfig, family: str) -> None:
    """Refuse settings that the family has no use for."""
    if model.max_text_length and family in ("sd", "sdxl"):
        raise UserError(f"model.max_text_length: it is for long text encoders, and {model.pretrained} has none")
    if model.guidance_embedding != 1 and family != "flux":
        raise UserError(f"model.guidance_embedding: {model.pretrained} takes no guidance scale as an input")


def check_variant(model: ModelConfig, pipeline: Path, family: str, trainable: bool) -> None:
    """Refuse, by a UserError and from JSON files alone, a `model.variant` that the pipeline is not."""
    given, variant = model.pretrained, model.variant
    if family != "sdxl":
        if variant != "base":
            raise UserError(f"model.variant: {variant} is one of SDXL's, and {given} is no SDXL pipeline")
        return
    refiner = bool(folder.read_json(pipeline / "model_index.json").get("requires_aesthetics_score"))
    if refiner and variant != "refiner":
        trains = "it draws no images by itself, and trains as the variant refiner"
        raise UserError(f"model.variant: {variant}, but {given} is SDXL's refiner; {trains}")
    if variant == "refiner" and not refiner:
        raise UserError(f"model.variant: refiner, but {given} takes no aesthetic score and so is not SDXL's refiner")
    scheduler = folder.read_json(folder.component(pipeline, "scheduler") / "scheduler_config.json")
    turbo = scheduler.get("timestep_spacing") == "trailing"
    if variant == "turbo" and not turbo:
        raise UserError(f"model.variant: turbo, but {given} is not SDXL-Turbo: its timestep_spacing is not trailing")
    if variant == "base" and turbo and trainable:
        log.warning("%s looks like SDXL-Turbo, which should train as model.variant turbo, at its four times", given)


def _choose_threads(net: torch.nn.Module) -> None:
    """Run a small network on half of the cores: its operations are so short that threads mostly wait for each other.

    Measured on two cores with the embedded model: a step takes 0.35 s on one thread and 0.60 s on two that wait
    passively; spinning threads need 0.32 s, but 2.6 s beside another busy process.
    """
    if sum(parameter.numel() for parameter in net.parameters()) < SMALL_NETWORK:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // 2)))
