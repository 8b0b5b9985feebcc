"""The network of any family: looked at without weights, loaded, fused or given adapters, and saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpref.errors import UserError
from diffpref.models import folder
from diffpref.models.lora import add_lora, load_lora, save_lora
from diffpref.train.config import ModelConfig


@dataclass(frozen=True)
class Network:
    """A family's network by its names in diffusers.

    part: the pipeline's name of it, "unet" or "transformer". kind: its class. pipeline: the pipeline's class.
    """

    part: str
    kind: str
    pipeline: str

    def find(self, model: ModelConfig, pipeline: Path) -> Path:
        """The folder of `model.unet` if given, else the pipeline's own; raises UserError where neither is there."""
        return folder.override(model.unet, self.part) if model.unet else folder.component(pipeline, self.part)

    def sketch(self, path: Path) -> Any:
        """What the folder's config.json describes, without weights: its config and the names of its layers.

        Raises UserError for a config.json that describes no such network.
        """
        config = folder.read_json(path / "config.json")
        try:
            with torch.device("meta"):
                return _diffusers(self.kind).from_config(config)
        except Exception as error:  # a wrong value fails wherever it is first used
            raise UserError(f"{path} does not load as a {self.kind}: {folder.first_line(error)}") from error

    def load(
        self, path: Path, sketch: Any, model: ModelConfig, device: torch.device, weights: torch.dtype, trainable: bool
    ) -> Any:
        """Load the weights, fuse `model.lora`, and choose what trains.

        fp32 if all of it trains, else the dtype `weights`, with fp32 adapters if `model.lora_rank` asks for them. These
        are tried on the sketch first, so that a layer which is not there is refused before any weights are loaded.
        """
        full, adapted = trainable and model.lora_rank == 0, trainable and model.lora_rank > 0
        if adapted:
            with torch.random.fork_rng([]):  # the trial takes no numbers from the adapters' first values
                add_lora(sketch, model)
        net = folder.load(_diffusers(self.kind), path, torch_dtype=torch.float32 if full else weights).to(device)
        for place, scale in zip(model.lora, model.lora_scales or [1.0] * len(model.lora), strict=True):
            load_lora(net, place, _diffusers(self.pipeline), self.part, scale)
        net.requires_grad_(full)  # after fusing, which freezes what it touches
        if adapted:
            add_lora(net, model)
        return net

    def save(self, net: Any, target: Path, lora: bool, pipeline: Path, vae: Path) -> None:
        """Write `target` as plain diffusers opens it: the pipeline with this network and VAE, or the LoRA weights."""
        if lora:
            save_lora(net, target, _diffusers(self.pipeline), self.part)
            return
        folder.copy_pipeline(pipeline, target, without={self.part, "vae"})
        folder.copy_part(vae, target / "vae")
        net.save_pretrained(target / self.part)


def input_dtype(net: Any, like: Tensor) -> torch.dtype:
    """What dtype a network takes its inputs in: its own, or that of `like` where autocast decides.

    The meta device has no autocast; plan/rules.py is its stand-in.
    """
    decided = like.is_meta or torch.is_autocast_enabled(like.device.type)
    return like.dtype if decided else next(net.parameters()).dtype


def _diffusers(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)
