"""Optimizers by name, the learning rate as a function of the step alone, and the weights that are to be looked at."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffpref.errors import UserError
from diffpref.sharding import local
from diffpref.train.config import TrainConfig

EXTRAS = {"adamw8bit": ("bitsandbytes", "8bit"), "schedule_free": ("schedulefree", "schedule-free")}
NOT_ADAFACTORS = ("adam_beta1", "adam_beta2", "adam_epsilon")


def check_optimizer(train: TrainConfig) -> None:
    """Refuse what the optimizer cannot do, before anything is loaded. Raises UserError naming the key."""
    name = train.optimizer
    if name in EXTRAS:
        library, extra = EXTRAS[name]
        if importlib.util.find_spec(library) is None:
            raise UserError(f"train.optimizer: {name} needs {library}: pip install 'diffpref[{extra}]'")
    if name == "adafactor":
        for key in NOT_ADAFACTORS:
            if getattr(train, key) != getattr(TrainConfig, key):
                raise UserError(f"train.{key}: adafactor has no such setting; leave it at {getattr(TrainConfig, key)}")
    if name == "schedule_free":
        if train.lr_scheduler not in ("constant", "constant_with_warmup"):
            raise UserError(
                f"train.lr_scheduler: schedule_free takes the place of {train.lr_scheduler!r}; use 'constant' or "
                "'constant_with_warmup'"
            )
        if not train.adam_beta1:
            raise UserError("train.adam_beta1: schedule_free averages by it, so it must be above 0")
        if train.ema:
            raise UserError("train.ema: schedule_free is an average of the weights already; leave it false")


def make_optimizer(parameters: Sequence[Tensor], train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over fp32 parameters. Raises UserError as `check_optimizer` does.

    Every one of them takes `weight_decay`, decoupled from the gradient. Adafactor is transformers', with the arguments
    of Diffusion-DPO's train.py for SDXL; torch's own has a relative step that cannot be turned off. Schedule-free
    AdamW gets its warm-up from the learning rate like the others, and stays in training mode: see
    `evaluation_weights`.
    """
    check_optimizer(train)
    adam: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
        "weight_decay": train.weight_decay,
    }
    if train.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
        )
    if train.optimizer == "adamw8bit":
        return importlib.import_module("bitsandbytes").optim.AdamW8bit(parameters, **adam)
    if train.optimizer == "schedule_free":
        optimizer = importlib.import_module("schedulefree").AdamWScheduleFree(parameters, **adam)
        optimizer.train()
        return optimizer
    return torch.optim.AdamW(parameters, **adam, fused=True)  # one kernel for all parameters


def make_lr_schedule(train: TrainConfig, processes: int) -> Callable[[int], float]:
    """The learning rate of an optimizer step, by the number of steps done before it: diffusers' schedule of that name.

    With `scale_lr` the rate is multiplied by the effective batch: processes x batch x accumulation.
    """
    from diffusers.optimization import get_scheduler

    scale = train.batch_size * train.gradient_accumulation_steps * processes if train.scale_lr else 1
    # diffusers gives its schedules bound to an optimizer; one of nothing keeps them off ours
    unused = torch.optim.SGD([torch.zeros(())], lr=1.0)
    schedule: Any = get_scheduler(
        train.lr_scheduler, unused, num_warmup_steps=train.lr_warmup_steps, num_training_steps=train.max_steps
    )
    share = schedule.lr_lambdas[0]
    return lambda step: train.learning_rate * scale * share(step)


@contextlib.contextmanager
def evaluation_weights(optimizer: Any) -> Iterator[None]:
    """While it lasts, the parameters are those to validate and publish; afterwards they are bit for bit as before.

    Only schedule-free AdamW has any others: it takes gradients at y and is good at x (arXiv 2405.15682). Its own way
    back from x to y rounds, so y is kept aside: looking at a run must not change it.
    """
    if not optimizer.param_groups[0].get("train_mode"):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [local(parameter).detach().to("cpu", copy=True) for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                local(parameter).copy_(before)


def trained_parameters(net: torch.nn.Module) -> dict[str, Tensor]:
    """What trains, by name."""
    return {name: value for name, value in net.named_parameters() if value.requires_grad}
