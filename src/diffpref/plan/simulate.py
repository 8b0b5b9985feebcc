"""A training step and the building of the store on the meta device: what they allocate, and their FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffpref.models.flux import Flux
from diffpref.models.loading import DTYPES
from diffpref.models.sd3 import StableDiffusion3
from diffpref.models.speed import checkpoint_activations
from diffpref.models.text import TextPart
from diffpref.plan.ledger import BLOCK, Ledger, bytes_of, held
from diffpref.plan.rules import Device, Rules
from diffpref.reference import adapters_off
from diffpref.train.config import Config
from diffpref.types import Cond

META = torch.device("meta")


@dataclass(frozen=True)
class Step:
    """Of a micro-step's `rows` rows. Memory in bytes; FLOPs are 2 x multiply-adds.

    saved: what the policy's forward leaves for the backward pass. peak: the most that is there above weights,
    reference and the gradients of former micro-steps. flops: of the reference's forward, the policy's forward and its
    backward pass, which holds what checkpointing computes again.
    """

    rows: int
    weights: int
    reference: int
    gradients: int
    saved: int
    peak: int
    reference_flops: int
    forward_flops: int
    backward_flops: int


def rows_of(config: Config) -> int:
    """The rows of a micro-step: two an item for points that give pairs."""
    return config.train.batch_size * (2 if config.points.gives_pairs else 1)


def run_step(config: Config, backbone: Any, device: Device = "cuda") -> Step:
    """One micro-step of a backbone whose parts are on the meta device, on `device`'s rules.

    Where a step has several micro-steps, it is one after the first: gradients are there before it. A reference that is
    a network of its own predicts as the policy does, with less to keep, so that is not run.
    """
    net, train = backbone.net, config.train
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    weights = bytes_of(held(net))
    known = held(net)
    apart = config.model.lora_rank == 0 or train.reference_decay is not None  # it is a network of its own
    reference = config.objective.needs_reference and not train.reference_cache
    net.disable_gradient_checkpointing()
    checkpoint_activations(net, train.gradient_checkpointing)
    if train.gradient_accumulation_steps > 1:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        known += [parameter.grad for parameter in trained]
    rows, rules = rows_of(config), Rules(DTYPES[train.mixed_precision], device)
    ledger = Ledger(BLOCK if device == "cuda" else 1)
    ledger.know(known)
    with ledger, rules:
        x_t, target = (torch.empty(rows, *latent_shape(config, backbone), device=META) for _ in range(2))
        t, cond = _times(backbone, rows), conditioning(backbone, rows)
        if reference and not apart:
            with rules.autocast():
                told = adapters_off(backbone)(x_t, t, cond).float()
            (told - target).square().flatten(1).mean(1)
        adapters_off_flops = ledger.flops
        with rules.autocast():
            predicted = backbone.predict(x_t, t, cond).float()
        loss = (predicted - target).square().flatten(1).mean(1).sum()
        saved, forward = ledger.live, ledger.flops - adapters_off_flops
        del predicted
        with rules.recomputing():
            _backward(loss)
        backward = ledger.flops - forward - adapters_off_flops
    for parameter in trained:
        parameter.grad = None
    return Step(
        rows=rows,
        weights=weights,
        reference=weights if reference and apart else 0,
        gradients=bytes_of(trained),
        saved=saved,
        peak=ledger.peak,
        reference_flops=(forward if apart else adapters_off_flops) if reference else 0,
        forward_flops=forward,
        backward_flops=backward,
    )


def _backward(loss: Tensor) -> None:
    """`loss.backward()` by the engine itself: torch's functions would put the rules aside until it is over."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@dataclass(frozen=True)
class Encoding:
    """FLOPs of an image through the VAE, and the most memory that a batch of images takes above the VAE's weights."""

    flops: int
    peak: int


def run_encoding(backbone: Any, side: int, images: int) -> Encoding:
    """The VAE's encoder, which works in fp32, on squares of `side` pixels."""
    vae, ledger = backbone.vae.model, Ledger()
    ledger.know(held(vae))
    with ledger, Rules(torch.float32, "cuda"):
        backbone.encode_images(torch.empty(images, 3, side, side, device=META))
    return Encoding(ledger.flops // images, ledger.peak)


def run_decoding(config: Config, backbone: Any, images: int) -> int:
    """The most memory that the VAE's decoder takes above its weights."""
    ledger = Ledger()
    ledger.know(held(backbone.vae.model))
    with torch.no_grad(), ledger, Rules(torch.float32, "cuda"):
        backbone.decode(torch.empty(images, *latent_shape(config, backbone), device=META))
    return ledger.peak


def latent_shape(config: Config, backbone: Any) -> tuple[int, int, int]:
    return backbone.latent_shape(config.data.resolution, config.data.resolution)


def tokens_of(part: TextPart) -> int:
    """How many tokens a text encoder reads; without its tokenizer, as many as it has positions for."""
    return part.limit or part.config["max_position_embeddings"]


def conditioning(backbone: Any, rows: int) -> Cond:
    """What the network is told, as `encode_prompts` shapes it."""
    config, parts = backbone.net.config, backbone.text_parts
    length = tokens_of(parts[-1])
    if isinstance(backbone, StableDiffusion3):
        length = tokens_of(backbone.clips[0]) + backbone.text_length
    width = config.get("cross_attention_dim") or config["joint_attention_dim"]
    cond = {"text": torch.empty(rows, length, width, device=META)}
    if "pooled" in backbone.cond_names:
        transformer = isinstance(backbone, (StableDiffusion3, Flux))
        pooled = config["pooled_projection_dim"] if transformer else parts[-1].config["projection_dim"]
        cond["pooled"] = torch.empty(rows, pooled, device=META)
    if "mask" in backbone.cond_names:
        cond["mask"] = torch.ones(rows, length, device=META)
    return cond


def text_flops(part: TextPart) -> int:
    """A prompt through a text encoder: two for each weight and token. Attention's own products are left out: 1%."""
    words = part.encoder
    words = getattr(getattr(words, "model", words), "language_model", words)  # Qwen2.5-VL's eyes stay shut
    table = words.get_input_embeddings().weight.numel()
    return 2 * (sum(weight.numel() for weight in words.parameters()) - table) * tokens_of(part)


def _times(backbone: Any, rows: int) -> Tensor:
    flow = hasattr(backbone, "sigmas")
    return torch.empty(rows, dtype=torch.float32 if flow else torch.int64, device=META)
