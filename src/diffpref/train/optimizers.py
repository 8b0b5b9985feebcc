"""The optimizer and its learning rate, as a function of the step alone."""

from __future__ import annotations

from typing import Any

import torch

from diffpref.train.config import TrainConfig


def make_optimizer(parameters: list[torch.nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, fused: one kernel for all parameters."""
    return torch.optim.AdamW(
        parameters,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
        fused=True,
    )


def make_lr_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, processes: int, done: int) -> Any:
    """diffusers' schedule of that name, set to where it stands after `done` optimizer steps.

    With `scale_lr` the rate is multiplied by the effective batch: processes x batch x accumulation.
    """
    from diffusers.optimization import get_scheduler

    scale = train.batch_size * train.gradient_accumulation_steps * processes if train.scale_lr else 1
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = train.learning_rate * scale
    schedule = get_scheduler(
        train.lr_scheduler, optimizer, num_warmup_steps=train.lr_warmup_steps, num_training_steps=train.max_steps
    )
    for group, rate, scaling in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * scaling(done)
    schedule.last_epoch = done
    return schedule
