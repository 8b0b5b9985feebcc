"""What the families' backbones share: pixels and latents, the network's place, guidance's two inputs, saving.

A family's class adds its text encoders and how its network is called. Nothing that is written here is overridden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffpref.models.network import Network
from diffpref.models.text import TextPart
from diffpref.types import Cond, Schedule


@runtime_checkable
class Autoencoder(Protocol):
    """An autoencoder as families use it; vae.py and qwenimage.py have one each."""

    path: Path
    device: torch.device

    def encode(self, pixels: Tensor) -> Tensor: ...

    def moments(self, pixels: Tensor) -> Tensor: ...

    def scale(self, latents: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def release(self) -> None: ...


@dataclass(kw_only=True)
class LatentBackbone(ABC):
    """A network on an autoencoder's latents, of the pipeline folder `pipeline`.

    guidance: the guidance scale that goes into the network; None if it takes none. zeros: whether guidance's
    unconditional branch sees zeros instead of the empty prompt.
    """

    net: Any
    schedule: Schedule
    pipeline: Path
    vae: Autoencoder
    scheduler_config: dict[str, Any]
    guidance: float | None = None
    zeros: bool = False
    network: ClassVar[Network]
    cond_names: ClassVar[tuple[str, ...]]

    def with_net(self, net: Any) -> LatentBackbone:
        """The same family with another network: a copy, or a wrapped one."""
        return replace(self, net=net)

    @property
    def embeds_guidance(self) -> bool:
        return self.guidance is not None

    def with_guidance(self, scale: float) -> LatentBackbone:
        """The same backbone with another embedded guidance scale; itself where the network takes none."""
        return replace(self, guidance=scale) if self.embeds_guidance else self

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def encode_images(self, pixels: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Unscaled mean latents (n, C, h, w) fp32 of pixels (n, 3, H, W) in [-1, 1]."""
        return self.vae.encode(pixels)

    def encode_moments(self, pixels: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c2 h w"]:
        """Mean and log variance of the latents' posterior, one behind the other: (n, 2 C, h, w) fp32, unscaled."""
        return self.vae.moments(pixels)

    def scale_latents(self, latents: Tensor) -> Tensor:
        return self.vae.scale(latents)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Pixels (n, 3, H, W) fp32 in [0, 1] of scaled latents."""
        return self.vae.decode(latents)

    def encode_unconditional(self, count: int) -> Cond:
        """What the pipeline's unconditional branch sees, `count` rows: the empty prompt, or zeros."""
        empty = self.encode_prompts([""] * count)
        return {name: torch.zeros_like(rows) for name, rows in empty.items()} if self.zeros else empty

    @property
    def text_parts(self) -> list[TextPart]:
        """The text encoders with their tokenizers."""
        values = [getattr(self, entry.name) for entry in fields(self)]
        listed = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        return [part for part in listed if isinstance(part, TextPart)]

    def release_encoders(self) -> None:
        """Let go of the autoencoder's and the text encoders' weights; they are loaded again where they are needed."""
        for part in (self.vae, *self.text_parts):
            part.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def save(self, target: Path, lora: bool) -> None:
        """Write `target` as plain diffusers opens it: the whole pipeline with this network, or its LoRA weights."""
        self.network.save(self.net, target, lora, self.pipeline, self.vae.path)

    @property
    @abstractmethod
    def resolution(self) -> int: ...

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Cond: ...

    @abstractmethod
    def overlong(self, prompts: list[str]) -> set[int]: ...

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor: ...

    @abstractmethod
    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]: ...

    @abstractmethod
    def identity(self) -> dict[str, str]: ...
