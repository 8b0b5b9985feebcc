"""The estimate of a run: what `diffpref plan` prints, as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from diffpref.data.store import images_at_once
from diffpref.models.loading import DTYPES, load_backbone
from diffpref.plan.gpus import Gpu
from diffpref.plan.ledger import bytes_of, held
from diffpref.plan.rules import Device
from diffpref.plan.simulate import (
    Step,
    conditioning,
    latent_shape,
    run_decoding,
    run_encoding,
    run_step,
    text_flops,
)
from diffpref.points import Inverted, Replay
from diffpref.train.config import Config

CONTEXT = 1_000_000_000  # of a GPU's memory; assumed: CUDA's context and kernels, and workspaces of cuBLAS and cuDNN
TIMES = 1000  # of training schedules
DRAWN = 8  # validation images that are decoded at once


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU by part. Not all parts are at their most at the same time; `peak` is the most of all.

    activations: what the policy's forward keeps for the backward pass, casts of weights included. encoders: VAE and
    text encoders, where training has them on the GPU. ema: in `peak` too, unless it is offloaded to the CPU.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    encoders: int
    context: int
    peak: int
    ema: int


@dataclass(frozen=True)
class Work:
    """FLOPs an item (a pair, or a single image), 2 x multiply-adds. encoders: where nothing is cached."""

    reference: float
    forward: float
    backward: float
    points: float
    encoders: float

    def total(self, cached: bool) -> float:
        return self.reference + self.forward + self.backward + self.points + (0 if cached else self.encoders)


class Planner:
    """What is asked of a model on the meta device; answers are computed when they are first asked for.

    config: with folders in place of hub ids (architectures.py), within `folder.without_weights()`. device: whose rules.
    """

    def __init__(self, config: Config, device: Device = "cuda") -> None:
        self.config = config
        self._device: Device = device
        self._context = CONTEXT if device == "cuda" else 0
        self._steps: dict[int, Step] = {}

    @cached_property
    def backbone(self) -> Any:
        """Raises UserError where the pipeline's parts do not fit, as training would."""
        train = self.config.train
        found: Any = load_backbone(self.config.model, torch.device("meta"), DTYPES[train.mixed_precision], True)
        latent_shape(self.config, found)  # refuses a resolution that the network cannot have
        return found

    @cached_property
    def trained(self) -> list[tuple[int, ...]]:
        """The shapes of what trains."""
        return [tuple(value.shape) for value in self.backbone.net.parameters() if value.requires_grad]

    def step(self, batch: int) -> Step:
        """A micro-step of `batch` items."""
        if batch not in self._steps:
            config = replace(self.config, train=replace(self.config.train, batch_size=batch))
            self._steps[batch] = run_step(config, self.backbone, self._device)
        return self._steps[batch]

    def memory(self, batch: int | None = None, optimizer: str | None = None, accumulates: bool | None = None) -> Memory:
        """Of training, after the first step, from a finished store."""
        train = self.config.train
        batch, optimizer = batch or train.batch_size, optimizer or train.optimizer
        step = self.step(batch)
        state, working = optimizer_bytes(optimizer, self.trained)
        accumulates = train.gradient_accumulation_steps > 1 if accumulates is None else accumulates
        before = step.gradients if accumulates else 0
        encoders = self.encoder_bytes if self.has_encoders else 0
        average = 4 * sum(math.prod(shape) for shape in self.trained) if train.ema else 0
        standing = step.weights + step.reference + state + encoders + self._context
        standing += 0 if train.offload_ema else average
        moments = [step.peak + before, step.gradients + working]
        if self.draws:
            moments.append(run_decoding(self.config, self.backbone, min(DRAWN, self.config.validation.images)))
        return Memory(
            weights=step.weights,
            reference=step.reference,
            gradients=step.gradients,
            optimizer=state,
            activations=step.saved,
            encoders=encoders,
            context=self._context,
            peak=standing + max(moments),
            ema=average,
        )

    @property
    def draws(self) -> bool:
        """Whether validation draws images."""
        return self.config.validation.prompts is not None and self.config.validation.images > 0

    @property
    def has_encoders(self) -> bool:
        """Whether training has the VAE and the text encoders on the GPU, finished store or not."""
        return self.config.data.cache == "none" or self.draws

    @cached_property
    def encoder_bytes(self) -> int:
        parts = [self.backbone.vae.model, *(part.encoder for part in self.backbone.text_parts)]
        return sum(bytes_of(held(part)) for part in parts)

    @cached_property
    def building(self) -> int:
        """The peak of building the store by itself (`diffpref data cache`), which loads the network too."""
        side = self.config.data.resolution
        peak = run_encoding(self.backbone, side, images_at_once((side, side))).peak
        return bytes_of(held(self.backbone.net)) + self.encoder_bytes + peak + CONTEXT

    @cached_property
    def work(self) -> Work:
        config = self.config
        batch = max(self._steps, default=config.train.batch_size)
        step = self.step(batch)
        points, forwards = config.points, 0.0
        rows = step.rows // batch
        if isinstance(points, Inverted):
            longest = TIMES * config.train.batch_size / (config.train.batch_size + 1)  # the expected latest time
            forwards = (longest / points.stride + 0.5) * (2 if points.method == "renoise" else 1)
        if isinstance(points, Replay):
            fresh = (points.trajectories, points.refresh_steps) == (1, 1)
            steps = (points.steps + 1) / 2 if fresh else points.steps / points.refresh_steps
            forwards = steps * (2 if points.guidance_scale > 1 else 1) / rows  # one row of an item's
        if config.objective.needs_mean_gain and config.train.gradient_accumulation_steps > 1:
            forwards += 1
        images = 2 if config.points.takes_pairs else 1
        prompts = 2 if images == 2 and config.data.captions == "image" else 1
        text = sum(text_flops(part) for part in self.backbone.text_parts) * prompts
        return Work(
            reference=step.reference_flops / batch,
            forward=step.forward_flops / batch,
            backward=step.backward_flops / batch,
            points=forwards * step.forward_flops / batch,
            encoders=images * run_encoding(self.backbone, config.data.resolution, 1).flops + text,
        )

    def seconds(self, card: Gpu, mfu: float) -> float:
        """Seconds of an optimizer step on one GPU: the FLOPs at the assumed share, and the optimizer's traffic."""
        train = self.config.train
        items = train.batch_size * train.gradient_accumulation_steps
        rate = card.single if train.mixed_precision == "no" else card.half
        flops = items * self.work.total(cached=self.config.data.cache != "none")
        state, _ = optimizer_bytes(train.optimizer, self.trained)
        moved = 2 * state + 3 * 4 * sum(math.prod(shape) for shape in self.trained)
        return flops / (rate * 1e12 * mfu) + moved / (card.bandwidth * 1e9)

    def disk(self, items: int) -> dict[str, int]:
        """Bytes of the store for so many items, of the checkpoints that are kept, and of final/."""
        config, data = self.config, self.config.data
        latent = 2 * math.prod(latent_shape(config, self.backbone))
        images = 2 if config.points.takes_pairs else 1
        latents = items * images * latent * (2 if data.latents == "moments" else 1) * (2 if data.flip else 1)
        prompts = items * (images if data.captions == "image" else 1)
        text = sum(2 * math.prod(value.shape[1:]) for value in conditioning(self.backbone, 1).values())
        count = sum(math.prod(shape) for shape in self.trained)
        copies = 1 + config.train.ema + (config.train.reference_decay is not None)
        one = 4 * count * copies + optimizer_bytes(config.train.optimizer, self.trained)[0]
        cached = data.cache != "none"
        whole = bytes_of(held(self.backbone.net)) + self.encoder_bytes
        return {
            "latents": latents if cached else 0,
            "text": prompts * text if cached else 0,
            "checkpoint": one,
            "final": 2 * 4 * count
            if config.model.lora_rank
            else whole,  # adapters under diffusers' and ComfyUI's names
        }


def optimizer_bytes(name: str, shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """Bytes of an optimizer's state, and of what it works with in a step, for fp32 parameters of these shapes."""
    counts = [math.prod(shape) for shape in shapes]
    if name == "adamw8bit":  # bitsandbytes: blocks of 256 numbers with a scale each; small tensors stay in fp32
        small = sum(count for count in counts if count < 4096)
        large = sum(count for count in counts if count >= 4096)
        return 8 * small + 2 * large + 2 * 4 * (large // 256), 0
    if name == "adafactor":
        rows = sum(math.prod(shape[:-1]) + math.prod(shape[:-2] + shape[-1:]) for shape in shapes if len(shape) > 1)
        whole = sum(math.prod(shape) for shape in shapes if len(shape) < 2)
        return 4 * (rows + whole), 3 * 4 * max(counts, default=0)
    return 8 * sum(counts), (4 * sum(counts) if name == "schedule_free" else 0)
