"""The autoencoder that the latent families share: diffusers' AutoencoderKL, frozen, in fp32, loaded when first used.

Half precision would save little here, and SDXL's own VAE overflows in fp16. And so a store's latents serve runs of any
precision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffpref.errors import UserError
from diffpref.models import folder
from diffpref.train.config import ModelConfig


@dataclass
class Vae:
    """An autoencoder's folder on a device; its config is read at once, its weights when pixels or latents come."""

    path: Path
    device: torch.device
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.config = folder.read_json(self.path / "config.json")

    @cached_property
    def model(self) -> Any:
        from diffusers import AutoencoderKL

        loaded = folder.load(AutoencoderKL, self.path, torch_dtype=torch.float32)
        return loaded.to(self.device).eval().requires_grad_(False)

    def release(self) -> None:
        """Let go of the weights; they are loaded again when they are needed."""
        self.__dict__.pop("model", None)

    @property
    def channels(self) -> int:
        """The channels of its latents."""
        return self.config["latent_channels"]

    @property
    def shrink(self) -> int:
        """How many pixels a latent's side stands for."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def check_channels(self, taken: int, network: Path) -> None:
        """Refuse a network that takes another number of channels than the latents have, by a UserError."""
        if taken != self.channels:
            raise UserError(f"{network} takes {taken} channels, but {self.path} gives {self.channels}")

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Unscaled mean latents (n, C, h, w) fp32 of pixels (n, 3, H, W) in [-1, 1]."""
        return self.model.encode(pixels.to(self.device, torch.float32)).latent_dist.mean

    @torch.no_grad()
    def moments(self, pixels: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c2 h w"]:
        """Mean and log variance of the posterior of pixels, one behind the other: (n, 2 C, h, w) fp32, unscaled."""
        found = self.model.encode(pixels.to(self.device, torch.float32)).latent_dist
        return torch.cat([found.mean, found.logvar], dim=1)

    def scale(self, latents: Tensor) -> Tensor:
        """Unscaled latents (..., C, h, w) as the network takes them: shifted and scaled by the config's numbers."""
        mean, deviation, factor = self._moments(latents)
        return (latents - mean) * factor / deviation

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Pixels (n, 3, H, W) fp32 in [0, 1] of scaled latents."""
        latents = latents.to(self.device, torch.float32)
        mean, deviation, factor = self._moments(latents)
        return (self.model.decode(latents * deviation / factor + mean).sample / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, width: int, height: int, patch: int = 1) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents; raises UserError for a side that does not divide evenly.

        patch: how many latents a side of a transformer's patch takes.
        """
        for side in (width, height):
            if side % self.shrink:
                raise UserError(f"resolution: {side} is no multiple of the VAE's {self.shrink}")
            if side % (self.shrink * patch):
                both = f"{self.shrink * patch}, the VAE's {self.shrink} times the patch's {patch}"
                raise UserError(f"resolution: {side} is no multiple of {both}")
        return self.channels, height // self.shrink, width // self.shrink

    def identity(self) -> str:
        """A hash of config and weights, which latents depend on."""
        return folder.weights_hash(self.path)

    def _moments(self, like: Tensor) -> tuple[Any, Any, float]:
        """Mean, deviation and factor; the first two are (C, 1, 1) where each channel has its own, else numbers."""
        factor = self.config.get("scaling_factor", 0.18215)
        mean, deviation = self.config.get("latents_mean"), self.config.get("latents_std")
        if mean is None or deviation is None:
            return self.config.get("shift_factor") or 0.0, 1.0, factor
        mean, deviation = (like.new_tensor(numbers).reshape(-1, 1, 1) for numbers in (mean, deviation))
        return mean, deviation, factor


def find_vae(model: ModelConfig, pipeline: Path, device: torch.device) -> Vae:
    """`model.vae` if given, else the pipeline's own; raises UserError where neither is there."""
    return Vae(folder.override(model.vae, "vae") if model.vae else folder.component(pipeline, "vae"), device)
