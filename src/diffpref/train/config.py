"""The typed configuration: what a preset is a value of, `--config` reads and `--print-config` writes.

Importing this imports no torch, so that `--help` answers at once. Keys follow diffusers' spelling.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from diffpref.errors import UserError, nearest
from diffpref.objectives import DPO, Objective
from diffpref.points import Paired, Placement


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and which of its weights."""

    pretrained: str = "embedded"
    """A pipeline folder, a hub id, or `embedded`."""
    family: Literal["sd"] = "sd"
    """The model family: a module of diffpref.models."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    vae: str | None = None
    """Another VAE: a folder, or a pipeline folder or hub id that holds one."""
    unet: str | None = None
    """Start from another U-Net: a folder, or a pipeline folder or hub id that holds one."""
    lora: str | None = None
    """LoRA weights to fuse into the U-Net before anything else: a file, or a run's final/ folder."""
    lora_rank: int = 0
    """Rank of the trained LoRA adapters; 0 trains the whole U-Net."""
    lora_alpha: int | None = None
    """LoRA scaling numerator; the rank when not given."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the layers that get adapters."""


@dataclass(frozen=True)
class DataConfig:
    """Which preferences are trained on, and how they are read."""

    path: str = "embedded"
    """A dataset in the normal form (see `diffpref data import`), or `embedded`."""
    split: str = "train"
    """Which split of it."""
    holdout: float = 0.0
    """Share of the prompts kept out of training, on whose pairs the held-out accuracy is measured."""
    resolution: int = 512
    """Side of the training images in pixels."""
    crop: Literal["center", "none"] = "center"
    """`center`: shortest side to the resolution, then the middle square; `none`: squeezed to the square."""
    flip: bool = False
    """Mirror half of the pairs, both images alike. Leave off where captions say left or right."""
    prompt_dropout: float = 0.0
    """Probability that a pair's prompts are replaced by the empty one, both alike."""
    ties: Literal["drop", "random", "soft"] = "drop"
    """Pairs of label 0.5: left out, given a winner by the seed, or trained on with the label 0.5."""
    cache: str | None = None
    """Folder of the latent store; beside the dataset (PATH.cache) when not given."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimization."""

    max_steps: int = 2000
    """Optimizer steps of the whole run."""
    batch_size: int = 1
    """Pairs (or single images) per process and micro-step."""
    gradient_accumulation_steps: int = 1
    """Micro-steps whose gradients make one optimizer step."""
    learning_rate: float = 1e-8
    """The learning rate after warm-up."""
    scale_lr: bool = False
    """Multiply the learning rate by the effective batch (processes x batch x accumulation)."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """How the learning rate changes with the step; diffusers' schedule of that name."""
    lr_warmup_steps: int = 0
    """Steps over which the rate rises from 0; `constant` ignores it."""
    optimizer: Literal["adamw"] = "adamw"
    """The optimizer: torch's fused AdamW."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """What AdamW adds to the denominator."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 never."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward pass and of weights that do not train. What trains is fp32 always; `fp16` needs a
    GPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    checkpointing_steps: int = 500
    """Steps between checkpoints; 0 writes none but the last."""
    checkpoints_total_limit: int = 2
    """Older complete checkpoints are removed; 0 keeps all."""
    logging_steps: int = 1
    """Steps between lines of `metrics.jsonl`; the last step is logged always."""
    seed: int = 0
    """Fixes the order of samples, their times, noises, flips and prompt drops, and the adapters' first values."""


@dataclass(frozen=True)
class ValidationConfig:
    """What is looked at during training."""

    steps: int = 0
    """Steps between validations; 0 validates at the end alone."""
    pairs: int = 256
    """At most so many held-out pairs are measured."""
    prompts: str | None = None
    """A text file of prompts (one a line) to draw images for, or `embedded`; none when not given."""
    images: int = 8
    """How many of these prompts."""
    sampler: Literal["ddpm", "ddim", "dpmsolver++", "euler"] = "ddim"
    """The sampler of the validation images."""
    num_inference_steps: int = 50
    """Its number of steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 or below is none."""
    seed: int = 0
    """Fixes the noise of validation images, and times and noises of the held-out pairs."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    output_dir: str = "runs/run"
    """The run folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Objective = field(default_factory=DPO)
    points: Placement = field(default_factory=Paired)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


def check(config: Config) -> Config:
    """The same configuration; raises UserError with one line for values that cannot work, naming the key."""
    model, data, train, look = config.model, config.data, config.train, config.validation
    positive: dict[str, float] = {
        "train.max_steps": train.max_steps,
        "train.batch_size": train.batch_size,
        "train.gradient_accumulation_steps": train.gradient_accumulation_steps,
        "train.learning_rate": train.learning_rate,
        "train.logging_steps": train.logging_steps,
        "data.resolution": data.resolution,
        "validation.pairs": look.pairs,
        "validation.num_inference_steps": look.num_inference_steps,
    }
    if model.lora_alpha is not None:
        positive["model.lora_alpha"] = model.lora_alpha
    if isinstance(config.objective, DPO):
        positive["objective.beta"] = config.objective.beta
    not_negative = {
        "model.lora_rank": model.lora_rank,
        "train.lr_warmup_steps": train.lr_warmup_steps,
        "train.adam_epsilon": train.adam_epsilon,
        "train.weight_decay": train.weight_decay,
        "train.max_grad_norm": train.max_grad_norm,
        "train.checkpointing_steps": train.checkpointing_steps,
        "train.checkpoints_total_limit": train.checkpoints_total_limit,
        "validation.steps": look.steps,
        "validation.images": look.images,
        "validation.guidance_scale": look.guidance_scale,
    }
    below_one = {
        "data.holdout": data.holdout,
        "data.prompt_dropout": data.prompt_dropout,
        "train.adam_beta1": train.adam_beta1,
        "train.adam_beta2": train.adam_beta2,
    }
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise UserError(f"{key}: {value} is not a finite number above 0")
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{key}: {value} is not a finite number from 0 up")
    for key, value in below_one.items():
        if not 0 <= value < 1:
            raise UserError(f"{key}: {value} is not from 0 up to below 1")
    if model.lora_rank and not model.lora_targets:
        raise UserError("model.lora_targets: no layer is named, so no adapter would be trained")
    if config.objective.needs_pairs != isinstance(config.points, Paired):
        wanted = "paired" if config.objective.needs_pairs else "independent"
        raise UserError(f"points.name: the objective {config.objective.name!r} needs {wanted!r} points")
    return config


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `from_yaml` reads back to the same value."""
    import yaml

    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def from_yaml(path: Path, base: Config) -> Config:
    """`base` with the keys that a YAML file gives; those it leaves out stay.

    Raises UserError with one line that names the file and the key: unknown keys with the nearest right name, values
    of a wrong type with the type wanted.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected keys with values at the top, found a {type(given).__name__}")
    merged = _merged(base, given, str(path), "")
    try:
        return TypeAdapter(Config).validate_json(json.dumps(_floats(merged), default=str), strict=True)
    except ValidationError as error:
        faults = error.errors()
        # a group that may be of several kinds is tried as each: the wrong kinds complain of the name, which is right
        first = next((fault for fault in faults if fault["loc"][-1] != "name"), faults[0])
        kinds = {kind.__name__ for group in get_type_hints(Config).values() for kind in get_args(group)}
        key = ".".join(str(part) for part in first["loc"] if part not in kinds)
        raise UserError(f"{path}: {key}: {first['msg'].lower()}, got {first['input']!r}") from error


def _merged(base: Any, given: dict[Any, Any], file: str, prefix: str) -> dict[str, Any]:
    """asdict(base) with the given keys laid over it, unknown ones refused; a group's `name` may choose its kind."""
    if "name" in given and (kinds := _kinds(prefix.rstrip("."))) and given["name"] != base.name:
        if str(given["name"]) not in kinds:
            raise UserError(f"{file}: {prefix}name: unknown {given['name']!r}: {nearest(str(given['name']), kinds)}")
        base = kinds[given["name"]]()
    known = {entry.name: getattr(base, entry.name) for entry in fields(base)}
    result: dict[str, Any] = asdict(base)
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{file}: unknown key {prefix}{key}: {nearest(str(key), known)}")
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise UserError(f"{file}: {prefix}{key}: expected a group of keys, got {value!r}")
            value = _merged(known[key], value, file, f"{prefix}{key}.")
        result[key] = value
    return result


def _kinds(group: str) -> dict[str, type]:
    """The kinds that a group of the configuration may be of, by their `name`."""
    kinds = get_args(get_type_hints(Config).get(group))
    return {kind().name: kind for kind in kinds}


def _floats(value: Any, annotation: Any = Config) -> Any:
    """Numbers that YAML 1.1 reads as text ("1e-4") as the numbers they are, where a float is wanted."""
    if isinstance(value, dict):
        kinds: list[Any] = [kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)]
        chosen = next((k for k in kinds if k().name == value.get("name")), kinds[0]) if len(kinds) > 1 else kinds[0]
        hints = get_type_hints(chosen)
        return {key: _floats(entry, hints.get(key)) for key, entry in value.items()}
    if annotation is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value
