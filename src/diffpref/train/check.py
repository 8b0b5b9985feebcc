"""What cannot work, refused before anything is loaded."""

from __future__ import annotations

import math
from typing import get_args

from diffpref.data.buckets import bucket_sizes
from diffpref.errors import UserError
from diffpref.points import Independent, Paired, Placement, Replay
from diffpref.train.config import Config


def check(config: Config) -> Config:
    """The same configuration; raises UserError with one line for values that cannot work, naming the key."""
    _check_numbers(config)
    _check_choices(config)
    return config


def _check_numbers(config: Config) -> None:
    model, data, train, guard, look = config.model, config.data, config.train, config.guard, config.validation
    positive: dict[str, float | str | None] = {
        "model.lora_alpha": model.lora_alpha,
        "data.resolution": data.resolution,
        "data.shuffle_block": data.shuffle_block,
        "data.choice_temperature": data.choice_temperature,
        "train.max_steps": train.max_steps,
        "train.batch_size": train.batch_size,
        "train.gradient_accumulation_steps": train.gradient_accumulation_steps,
        "train.micro_batch": train.micro_batch,
        "train.learning_rate": train.learning_rate,
        "train.process_timeout": train.process_timeout,
        "train.logging_steps": train.logging_steps,
        "train.snr_gamma": train.snr_gamma,
        "train.skip_spikes": train.skip_spikes,
        "guard.share": guard.share,
        "guard.steps": guard.steps,
        "validation.pairs": look.pairs,
        "validation.num_inference_steps": look.num_inference_steps,
    }
    not_negative: dict[str, float] = {
        "model.lora_rank": model.lora_rank,
        "model.guidance_embedding": model.guidance_embedding,
        "model.max_text_length": model.max_text_length,
        "train.reference_cache": train.reference_cache,
        "train.lr_warmup_steps": train.lr_warmup_steps,
        "train.adam_epsilon": train.adam_epsilon,
        "train.weight_decay": train.weight_decay,
        "train.max_grad_norm": train.max_grad_norm,
        "train.checkpointing_steps": train.checkpointing_steps,
        "train.checkpoints_total_limit": train.checkpoints_total_limit,
        "train.checkpoints_keep_every": train.checkpoints_keep_every,
        "validation.steps": look.steps,
        "validation.images": look.images,
        "validation.guidance_scale": look.guidance_scale,
    }
    below_one = {
        "data.holdout": data.holdout,
        "data.prompt_dropout": data.prompt_dropout,
        "train.adam_beta1": train.adam_beta1,
        "train.adam_beta2": train.adam_beta2,
        "train.ema_decay": train.ema_decay,
        "train.reference_decay": train.reference_decay or 0.0,
        "train.sdpo_mu": train.sdpo_mu or 0.0,
    }
    for name, group in (("objective", config.objective), ("points", config.points)):
        positive |= {f"{name}.{key}": getattr(group, key) for key in group.positive}
        not_negative |= {f"{name}.{key}": getattr(group, key) for key in group.not_negative}
        below_one |= {f"{name}.{key}": getattr(group, key) for key in group.below_one}
        for key in group.below_half:
            if not 0 <= getattr(group, key) < 0.5:
                raise UserError(f"{name}.{key}: {getattr(group, key)} is not from 0 up to below 0.5")
    for key, value in positive.items():
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise UserError(f"{key}: {value} is not a finite number above 0")
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{key}: {value} is not a finite number from 0 up")
    for key, value in below_one.items():
        if not 0 <= value < 1:
            raise UserError(f"{key}: {value} is not from 0 up to below 1")


def _check_choices(config: Config) -> None:
    model, data, objective, points = config.model, config.data, config.objective, config.points
    every, kept = config.train.checkpointing_steps, config.train.checkpoints_keep_every
    if kept and (not every or kept % every):
        raise UserError(
            f"train.checkpoints_keep_every: {kept} is no multiple of train.checkpointing_steps, {every}, at whose "
            "multiples checkpoints are written"
        )
    if model.lora_rank and not model.lora_targets:
        raise UserError("model.lora_targets: no layer is named, so no adapter would be trained")
    if objective.needs_pairs != points.gives_pairs:
        wanted = "pairs" if objective.needs_pairs else "single images"
        fitting = ", ".join(kind().name for kind in get_args(Placement) if kind().gives_pairs == objective.needs_pairs)
        raise UserError(
            f"points.name: the objective {objective.name!r} needs points of {wanted} ({fitting}), not {points.name!r}"
        )
    if data.crop == "random" and data.cache != "none":
        raise UserError(
            "data.crop: a random crop is another at every step, so it cannot be stored; add --data.cache none"
        )
    bucket_sizes(data)  # refuses keys that make none
    if data.buckets and isinstance(points, Replay) and (points.trajectories, points.refresh_steps) != (1, 1):
        raise UserError(
            "data.buckets: replay points that keep trajectories keep them in one shape; "
            "leave points.trajectories and points.refresh_steps at 1"
        )
    if data.choice_temperature is not None and data.choice_model is None:
        raise UserError("data.choice_temperature: labels come from scores only under data.choice_model; set that too")
    if config.train.skip_spikes is not None and config.train.skip_spikes <= 1:
        raise UserError(
            f"train.skip_spikes: {config.train.skip_spikes} is not above 1, so half of the steps are spikes"
        )
    if config.train.sdpo_mu is not None and not objective.needs_pairs:
        raise UserError(f"train.sdpo_mu: the safeguard is for objectives of pairs, and {objective.name!r} is not one")
    if config.train.reference_decay is not None and not objective.needs_reference:
        raise UserError(f"train.reference_decay: the objective {objective.name!r} has no reference that could follow")
    train, own = config.train, config.train.batch_size * config.train.gradient_accumulation_steps
    if isinstance(train.micro_batch, int) and own % train.micro_batch:
        raise UserError(
            f"train.micro_batch: {train.micro_batch} does not divide train.batch_size x "
            f"train.gradient_accumulation_steps = {own}"
        )
    if config.train.reference_cache:
        _check_reference_cache(config)
    if len(model.lora_scales) not in (0, len(model.lora)):
        raise UserError(f"model.lora_scales: {len(model.lora_scales)} numbers for {len(model.lora)} of model.lora")
    if config.guard.action in ("stop", "rollback") and not objective.needs_reference:
        raise UserError(f"guard.action: the guard compares with the reference, and {objective.name!r} has none")
    if config.model.variant == "refiner" and config.validation.prompts is not None:
        raise UserError("validation.prompts: SDXL's refiner draws no images from prompts alone; leave the key out")
    if config.validation.scorer and config.validation.prompts is None:
        raise UserError("validation.scorer: there is nothing to score; set validation.prompts")
    if config.guard.action == "rollback" and not config.train.checkpointing_steps:
        raise UserError("guard.action: rollback needs checkpoints to go back to; set train.checkpointing_steps")


def _check_reference_cache(config: Config) -> None:
    """Refuse what needs more of the reference than its errors at draws that are known before training."""
    objective, key = config.objective, "train.reference_cache"
    if not objective.needs_reference:
        raise UserError(f"{key}: the objective {objective.name!r} has no reference whose errors could be kept")
    if objective.needs_prediction:
        raise UserError(f"{key}: the objective {objective.name!r} needs the reference's predictions, not errors alone")
    if not isinstance(config.points, Paired | Independent):
        raise UserError(
            f"{key}: {config.points.name!r} points follow the policy, so the reference's errors there are not known "
            "before; it is for paired and independent points"
        )
    if config.train.reference_decay is not None:
        raise UserError(f"{key}: the reference moves by train.reference_decay, so its errors cannot be kept")
    if config.data.cache == "none":
        raise UserError(f"{key}: errors are kept beside the latent store; leave out data.cache none and random crops")
