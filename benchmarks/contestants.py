"""The training steps that benchmarks compare, and what they cost: ours, and the one that encodes each time.

Ours is the step of `diffpref train` itself (train.step.Learner on the latent store). The other is written after the
published Diffusion-DPO script: VAE and text encoder in each step, torch's plain AdamW, eager; in full fine-tuning with
a second network as the reference, in half precision where the training has it; with LoRA by switching adapters off, as
diffusers' script does. Images are pixels on the device already: reading and decoding them is on no one's bill.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from diffpref.data.ahead import Ahead
from diffpref.data.importing import import_source
from diffpref.draws import draw_seed
from diffpref.embedded import PREFERENCES
from diffpref.models.loading import load_backbone, weights_dtype
from diffpref.models.speed import channels_last, checkpoint_activations, compile_blocks
from diffpref.objectives import DPO
from diffpref.points import Paired
from diffpref.reference import adapters_off, frozen_copy
from diffpref.train.config import Config, DataConfig, ModelConfig, TrainConfig
from diffpref.train.optimizers import make_optimizer
from diffpref.train.placing import make_placer
from diffpref.train.preferences import open_preferences
from diffpref.train.reference_cache import with_reference_errors
from diffpref.train.step import Learner
from diffpref.types import Backbone, Batch, Outputs, Points, Predict

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.full_size import make_sd15, make_sdxl

MODELS = {"sd15": make_sd15, "sdxl": make_sdxl}
ROWS, RANK = 16, 16


@dataclass(frozen=True)
class Contestant:
    """A way to take an optimizer step on so many pairs.

    step: takes step number n. parts: FLOPs of policy forward and backward, and of the reference's forward if the step
    has one. learner: there if it is ours.
    """

    pairs: int
    step: Callable[[int], Any]
    parts: Callable[[], int]
    learner: Learner | None = None

    def flops(self) -> int:
        """FLOPs of a whole step, which is taken for it."""
        return counted(lambda: self.step(0))

    @property
    def waited(self) -> float:
        """Seconds in which the step has waited for its data so far."""
        return self.learner.data.waited if self.learner else 0.0

    def close(self) -> None:
        """End its thread."""
        if self.learner:
            self.learner.data.close()


@dataclass(frozen=True)
class Equipment:
    """What contestants may share: the policy, its reference, and the settings."""

    config: Config
    accelerator: Accelerator
    backbone: Backbone
    trained: list[Any]

    def quick(self, net: Any) -> None:
        """Do to a network of ours what `diffpref train` does."""
        channels_last(net, self.config.train.channels_last, self.accelerator.device)
        if self.config.train.compile:
            compile_blocks(net)


def prepare(folder: Path, model: str, width: float, config: Config) -> Config:
    """Write the model and some pairs, and fill the store; the configuration that names them."""
    MODELS[model](folder / "model", width)
    (folder / "source").mkdir()
    pq.write_table(pq.read_table(PREFERENCES / "train.parquet").slice(0, ROWS), folder / "source" / "train.parquet")
    import_source("pickapic", folder / "source", folder / "pairs")
    named = replace(
        config,
        model=replace(config.model, pretrained=str(folder / "model")),
        data=replace(config.data, path=str(folder / "pairs")),
    )
    gear = equip(named, lora=False)  # the encoders go with it
    open_preferences(named, gear.backbone, gear.accelerator)
    return named


def configuration(resolution: int, precision: str, pairs: int, steps: int, **train: Any) -> Config:
    """DPO at published settings; the learning rate hardly moves anything."""
    settings = TrainConfig(max_steps=steps, batch_size=pairs, learning_rate=1e-8, mixed_precision=precision, **train)
    return Config(model=ModelConfig(), data=DataConfig(resolution=resolution), objective=DPO(), train=settings)


def equip(config: Config, lora: bool) -> Equipment:
    """Load the network that trains, or its adapters."""
    config = replace(config, model=replace(config.model, lora_rank=RANK if lora else 0))
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision, cpu=not torch.cuda.is_available())
    weights = weights_dtype(config.train.mixed_precision, accelerator.device)
    backbone = load_backbone(config.model, accelerator.device, weights, trainable=True)
    return Equipment(config, accelerator, backbone, [p for p in backbone.net.parameters() if p.requires_grad])


def ours(gear: Equipment, cached: bool, reference: Predict | None = None, optimizer: Any = None) -> Contestant:
    """Our step, with a live reference (the one that is given, or the configuration's own) or with kept errors."""
    config, accelerator, backbone = gear.config, gear.accelerator, gear.backbone
    loader, _, _ = open_preferences(config, backbone, accelerator)
    if cached:
        config = replace(config, train=replace(config.train, reference_cache=1))
        loader, reference = with_reference_errors(config, backbone, accelerator, loader, None)[0], None
    elif reference is None:
        reference = adapters_off(backbone) if config.model.lora_rank else frozen_copy(backbone, gear.quick)
    gear.quick(backbone.net)
    checkpoint_activations(backbone.net, config.train.gradient_checkpointing)
    place = make_placer(config.points, backbone, reference, config.train, accelerator)
    net, optimizer = accelerator.prepare(backbone.net, optimizer or make_optimizer(gear.trained, config.train))
    policy = backbone.with_net(net)
    learner = Learner(accelerator, policy, reference, place, Ahead(loader), config.objective, config.train)

    def parts() -> int:
        return _parts(gear, reference, learner.look(0, 0).points)

    return Contestant(config.train.batch_size, lambda number: learner.step(number, optimizer), parts, learner)


def published(gear: Equipment) -> Contestant:
    """The step that encodes each time."""
    from diffusers import AutoencoderKL

    config, accelerator, backbone = gear.config, gear.accelerator, gear.backbone
    weights = weights_dtype(config.train.mixed_precision, accelerator.device)
    place = Path(config.model.pretrained) / "vae"
    vae: Any = AutoencoderKL.from_pretrained(place, torch_dtype=weights)
    vae = vae.to(accelerator.device).requires_grad_(False)
    if config.model.lora_rank:
        reference = adapters_off(backbone)
    else:
        second = backbone.with_net(copy.deepcopy(backbone.net).to(weights).requires_grad_(False))
        reference = torch.no_grad()(second.predict)
    net, optimizer = accelerator.prepare(backbone.net, torch.optim.AdamW(gear.trained, lr=config.train.learning_rate))
    policy = backbone.with_net(net)
    pairs, side = config.train.batch_size, config.data.resolution
    pixels = torch.rand(2 * pairs, 3, side, side, device=accelerator.device, dtype=weights) * 2 - 1
    prompts = ["a small blue cross on the left, grey background"] * pairs
    ones = torch.ones(pairs, device=accelerator.device)

    def points(number: int) -> Points:
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample().float() * vae.config["scaling_factor"]
            with accelerator.autocast():
                text = backbone.encode_prompts(prompts)
        cond = {name: torch.cat([part, part]) for name, part in text.items()}
        draws = tuple(draw_seed(number, pair) for pair in range(pairs))
        batch = Batch(latents, cond, ones, ones, tuple(map(str, draws)), draws)
        return Paired()(batch, backbone.schedule)

    def step(number: int) -> None:
        at = points(number)
        with accelerator.autocast():
            predicted = policy.predict(at.x_t, at.t, at.cond)
            known = reference(at.x_t, at.t, at.cond)
        losses, _ = DPO()(Outputs(predicted, at.target, known, at.label, at.weight))
        accelerator.backward(losses.mean())
        accelerator.clip_grad_norm_(gear.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def parts() -> int:
        return _parts(gear, reference, points(0))

    return Contestant(pairs, step, parts)


def _parts(gear: Equipment, reference: Predict | None, at: Points) -> int:
    """FLOPs of the policy's forward and backward and of the reference's forward, counted one by one on one pair.

    To be asked for last: activations are kept from here on, for computing them again is no progress.
    """
    net, two = gear.backbone.net, {name: part[:2] for name, part in at.cond.items()}
    net.disable_gradient_checkpointing()
    with gear.accelerator.autocast():
        known = counted(lambda: reference(at.x_t[:2], at.t[:2], two)) if reference else 0
        learnt = counted(lambda: gear.backbone.predict(at.x_t[:2], at.t[:2], two).float().square().mean().backward())
    net.zero_grad()
    return (known + learnt) * (len(at.x_t) // 2)


def counted(call: Callable[[], Any]) -> int:
    """The FLOPs of a call: 2 for each multiplication and addition of matrices, convolutions and attention.

    Blocks that are compiled run as they are written, for in compiled ones nothing would be counted.
    """
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
