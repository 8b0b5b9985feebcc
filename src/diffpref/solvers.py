"""Samplers in which every sample has its own times, with one forward of the network a step for all of them.

diffusers' schedulers hold one row of times for the whole batch. These are their formulas (DDPM: Ho et al. 2020, eq. 7;
DDIM: Song et al. 2021, eq. 12 with eta 0; DPM-Solver++ 2M: Lu et al. 2022, arXiv 2211.01095, algorithm 2, midpoint,
first and last step of first order; Euler for rectified flow) with a column of times for each sample. A sample gets
what diffusers' scheduler gives it alone, set to its times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from diffpref.errors import UserError
from diffpref.moving import on_device, to_device
from diffpref.schedules import DiffusionSchedule, FlowSchedule
from diffpref.types import Cond, Latents, Predict, Schedule

Sampler = Literal["ddpm", "ddim", "dpmsolver++", "flow"]
SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler"}
# log(signal / noise) below which no sample starts: diffusers' advice for cosine schedules, whose last times hold so
# little signal that dividing by it makes large numbers of small errors. SD's own schedule ends at -2.7.
LEAST = -5.1
# What the times of DPM-Solver++ may not be moved by, whatever else a model's scheduler_config.json asks of this class.
DPM: dict[str, Any] = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "lambda_min_clipped": LEAST}
DPM |= {f"use_{name}_sigmas": False for name in ("karras", "exponential", "beta", "flow")} | {"use_lu_lambdas": False}


@dataclass(frozen=True)
class Solver:
    """How n samples are led from noise to latents.

    times: (steps, n), falling in each column, as the network takes them. levels: (steps + 1, n) fp32, for diffusion the
    cumulated alphas at these times and after the last step, for flows the share of noise.
    """

    sampler: Sampler
    times: Real[Tensor, "steps n"]
    levels: Float[Tensor, "levels n"]
    velocity: bool
    clip: float | None = None

    def to(self, device: torch.device) -> Solver:
        """The same on another device."""
        return replace(self, times=to_device(self.times, device), levels=to_device(self.levels, device))

    def of(self, rows: Tensor) -> Solver:
        """The same for some of the samples."""
        return replace(self, times=self.times[:, rows], levels=self.levels[:, rows])

    def step(
        self, i: int, x: Latents, prediction: Latents, before: Latents | None, noise: Latents | None = None
    ) -> tuple[Latents, Latents]:
        """The samples after step i, and the clean latents that it predicts: `before` of the next step.

        x, prediction: (n, C, H, W) fp32. noise: as x, needed by DDPM alone.
        """
        levels = self.levels[..., None, None, None]
        if self.sampler == "flow":
            return x + (levels[i + 1] - levels[i]) * prediction, x - levels[i] * prediction
        if self.sampler == "dpmsolver++":
            return self._dpm(levels, i, x, prediction, before)
        now, after = levels[i], levels[i + 1]
        x0, epsilon = self._split(x, prediction, now.sqrt(), (1 - now).sqrt())
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        if self.sampler == "ddim":
            return after.sqrt() * x0 + (1 - after).sqrt() * epsilon, x0
        if noise is None:
            raise ValueError("DDPM needs noise")
        alpha = now / after
        mean = after.sqrt() * (1 - alpha) / (1 - now) * x0 + alpha.sqrt() * (1 - after) / (1 - now) * x
        spread = ((1 - after) / (1 - now) * (1 - alpha)).clamp_min(1e-20).sqrt()
        return torch.where(self.times[i, :, None, None, None] > 0, mean + spread * noise, mean), x0

    def _dpm(self, levels: Tensor, i: int, x: Tensor, prediction: Tensor, before: Tensor | None) -> Any:
        sigmas = ((1 - levels) / levels).sqrt()
        signal = 1 / (sigmas**2 + 1).sqrt()
        spread = sigmas * signal
        rate = signal.log() - spread.log()  # infinite after the last step
        x0, _ = self._split(x, prediction, signal[i], spread[i])
        h = rate[i + 1] - rate[i]
        grown = signal[i + 1] * (torch.exp(-h) - 1.0)
        moved = (spread[i + 1] / spread[i]) * x - grown * x0
        if before is None or i == len(self.times) - 1:
            return moved, x0
        ratio = (rate[i] - rate[i - 1]) / h
        return moved - 0.5 * grown * ((1.0 / ratio) * (x0 - before)), x0

    def _split(self, x: Tensor, prediction: Tensor, signal: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that a prediction implies."""
        if self.velocity:
            return signal * x - spread * prediction, signal * prediction + spread * x
        return (x - spread * prediction) / signal, prediction


def make_solver(
    sampler: Sampler,
    schedule: Schedule,
    config: dict[str, Any],
    steps: int,
    jitter: Float[Tensor, " n"],
    perturb: bool,
    shape: tuple[int, int],
) -> Solver:
    """A solver for n samples under a model's schedule and scheduler_config.json.

    jitter: on the CPU, fp64 in [0, 1), by which the times of each sample are moved if `perturb`.
    shape: (height, width) of the latents, on which a flow's shift may depend.
    Raises UserError for a sampler that the schedule does not have, and for settings that these formulas lack.
    """
    check_sampler(sampler, schedule)
    if isinstance(schedule, FlowSchedule):
        shares = _shares(steps, jitter if perturb else torch.zeros_like(jitter), flow_shift(config, shape))
        return Solver(sampler, 1000 * shares[:-1], shares, velocity=True)
    scheduler = _scheduler(sampler, config)
    alphas: Tensor = scheduler.alphas_cumprod
    times = _perturbed(steps, alphas, jitter) if perturb else _regular(scheduler, steps, jitter)
    final = torch.ones(1, len(jitter))
    if sampler == "ddim" and not scheduler.config.set_alpha_to_one:
        final = alphas[0] * final
    clip = scheduler.config.clip_sample_range if scheduler.config.get("clip_sample") else None
    velocity = scheduler.config.prediction_type == "v_prediction"
    return Solver(sampler, times, torch.cat([alphas[times], final]), velocity, clip)


def check_sampler(sampler: Sampler, schedule: Schedule) -> None:
    """Raise UserError unless models of this schedule can be sampled so, from pure noise, at all times."""
    if isinstance(schedule, FlowSchedule) != (sampler == "flow"):
        fitting = "flow" if isinstance(schedule, FlowSchedule) else " or ".join(SCHEDULERS)
        kind = "a flow" if isinstance(schedule, FlowSchedule) else "no flow"
        raise UserError(f"points.sampler: {sampler} does not sample this model, which is {kind}: use {fitting}")
    if isinstance(schedule, DiffusionSchedule) and schedule.times is not None:
        raise UserError("points.name: replay needs a model of all times; a turbo model or refiner has but some of them")


def flow_shift(config: dict[str, Any], shape: tuple[int, int]) -> float:
    """By how much a flow's sampler prefers late times, for latents of (height, width) in patches of 2 x 2.

    A shift that grows with the resolution is that of the pipelines of FLUX and Qwen-Image.
    """
    if not config.get("use_dynamic_shifting"):
        return config.get("shift", 1.0)
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (shape[0] // 2 * (shape[1] // 2) - few) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def _scheduler(sampler: Sampler, config: dict[str, Any]) -> Any:
    import diffusers

    forced = DPM if sampler == "dpmsolver++" else {}
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(config, **forced)
    if scheduler.config.thresholding:
        raise UserError("points.sampler: the model's scheduler_config.json sets thresholding, which replay lacks")
    if sampler == "ddpm" and scheduler.config.variance_type not in ("fixed_small", "fixed_small_log"):
        raise UserError(f"points.sampler: no ddpm with variance_type {scheduler.config.variance_type!r}; use ddim")
    return scheduler


def _perturbed(steps: int, alphas: Tensor, jitter: Tensor) -> Tensor:
    """(steps, n) int64: the grid of every (T // steps)-th of T times, each column moved up by its share of that.

    So each time is as likely as any other (where `steps` divides T). All steps of a sample move alike.
    """
    total = int((alphas / (1 - alphas) >= math.exp(2 * LEAST)).sum())
    ratio = total // steps
    if ratio < 1:
        raise UserError(f"points.steps: {steps} are more than the {total} times from which the model can be sampled")
    grid = torch.arange(steps - 1, -1, -1) * ratio
    return grid[:, None] + (jitter * ratio).long()


def _regular(scheduler: Any, steps: int, jitter: Tensor) -> Tensor:
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise UserError(f"points.steps: {' '.join(str(error).split())}") from error
    return scheduler.timesteps[:, None].expand(-1, len(jitter)).contiguous()


def _shares(steps: int, jitter: Tensor, shift: float) -> Tensor:
    """(steps + 1, n) fp32, from at most 1 to 0: regular times moved down by less than a step, then shifted."""
    regular = torch.arange(steps, 0, -1)[:, None]
    shares = ((regular - jitter) / steps).float()
    shares = shift * shares / (1 + (shift - 1) * shares)
    return torch.cat([shares, torch.zeros_like(shares[:1])])


@dataclass(frozen=True)
class Visit:
    """Where samples stand before step `index`: which of them (rows), noisy latents, times, and what is predicted.

    items: the rows again, as the host knows them without asking the device.
    """

    index: int
    rows: Int[Tensor, " k"]
    x_t: Latents
    t: Real[Tensor, " k"]
    prediction: Latents
    items: list[int]


def walk(
    predict: Predict,
    solver: Solver,
    x: Latents,
    cond: Cond,
    last: Int[Tensor, " n"] | list[int],
    noise: Float[Tensor, "n steps c h w"] | None = None,
    steady: bool = False,
) -> Iterator[Visit]:
    """Lead n samples from pure noise x through the solver's steps, each to its own `last` step and no further.

    cond: what `predict` takes, n rows. noise: what DDPM adds at each step. steady: all n are led to the last of their
    last steps, so that `predict` always gets n rows, as a compiled network wants.
    """
    ends: list[int] = last if isinstance(last, list) else last.tolist()
    items, rows, before = list(range(len(x))), torch.arange(len(x), device=x.device), None
    for index in range(max(ends) + 1):
        with torch.no_grad():
            prediction = predict(x, solver.times[index], cond).float()
        yield Visit(index, rows, x, solver.times[index], prediction, items)
        x, before = solver.step(index, x, prediction, before, None if noise is None else noise[:, index])
        kept = [place for place, item in enumerate(items) if ends[item] > index]
        if len(kept) < len(items) and not steady:
            items, going = [items[place] for place in kept], on_device(kept, x.device, torch.int64)
            rows, x, before, solver = rows[going], x[going], before[going], solver.of(going)
            cond = {name: value[going] for name, value in cond.items()}
            noise = None if noise is None else noise[going]
