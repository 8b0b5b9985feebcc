"""The frozen records that flow through a training step: Batch -> Points -> Outputs -> (loss per row, Metrics).

Their shapes are annotated with jaxtyping; the tests check them at run time, over the whole package.

Rows and items: an *item* is what a loss is computed for, a pair or a single image. A batch of n pairs has 2 n rows,
the n chosen images first, then the n rejected ones in the same order; a batch of n single images has n rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Real
from torch import Tensor

Cond = dict[str, Tensor]  # conditioning per row; what its keys mean is known to models/ alone
Metrics = dict[str, Tensor]  # per item, unreduced, detached
Latents = Float[Tensor, "rows channels height width"]
Predict = Callable[[Tensor, Tensor, Cond], Tensor]  # (x_t, t, cond) -> what a network predicts there
Items = Literal["pairs", "liked", "judged"]  # pairs; single preferred images; single images labelled 1 or 0


@dataclass(frozen=True)
class Batch:
    """Clean latents with their conditioning.

    latents: (rows, C, H, W) fp32, shifted and scaled as the network expects them.
    label: (items,) fp32, for a pair the probability that chosen is the better one, for a single image 1 (liked) or 0.
    weight: (items,) fp32.
    id: the items' names. draw: the items' seeds, each a function of (seed, epoch, place) alone.
    known_error: (rows,) fp32, the reference's unscaled errors there, if they are kept (`train.reference_cache`).
    """

    latents: Latents
    cond: Cond
    label: Float[Tensor, " items"]
    weight: Float[Tensor, " items"]
    id: tuple[str, ...]
    draw: tuple[int, ...]
    known_error: Float[Tensor, " rows"] | None = None


@dataclass(frozen=True)
class Points:
    """Where the policy is examined: noisy latents, their times and what should be predicted there.

    x_t, target: (rows, C, H, W) fp32. t: (rows,), as the network takes it: int64 for diffusion, fp32 for flows.
    label, weight: (items,). scale: (rows,) fp32, what each row's errors are multiplied by (min-SNR); None is 1.
    """

    x_t: Latents
    t: Real[Tensor, " rows"]
    target: Latents
    cond: Cond
    label: Float[Tensor, " items"]
    weight: Float[Tensor, " items"]
    scale: Float[Tensor, " rows"] | None = None


@dataclass(frozen=True)
class Outputs:
    """What policy and reference predicted at the points. policy, target, reference: (rows, C, H, W).

    scale: (rows,), as in Points. mean_gain: (), the mean of `gain()` over all rows of the whole effective batch, of all
    micro-batches and processes, detached; there if the objective asks for it by `needs_mean_gain`.
    known_error: (rows,) fp32, the reference's unscaled errors, in place of its predictions where these were not made.
    """

    policy: Latents
    target: Latents
    reference: Latents | None
    label: Float[Tensor, " items"]
    weight: Float[Tensor, " items"]
    scale: Float[Tensor, " rows"] | None = None
    mean_gain: Float[Tensor, ""] | None = None
    known_error: Float[Tensor, " rows"] | None = None

    def policy_error(self) -> Float[Tensor, " rows"]:
        """(rows,) fp32: the mean over elements of (policy - target)^2, times the scale; L in the papers."""
        return self._mean((self.policy.float() - self.target.float()).square())

    def reference_error(self) -> Float[Tensor, " rows"]:
        """(rows,) fp32: the same for the reference; R in the papers. Raises ValueError without a reference."""
        if self.known_error is not None:
            return self._scaled(self.known_error)
        if self.reference is None:
            raise ValueError("this objective needs a reference, and none was run")
        return self._mean((self.reference.float() - self.target.float()).square())

    def gain(self) -> Float[Tensor, " rows"]:
        """(rows,) fp32: R - L, how much nearer to the target the policy is than the reference.

        Computed as the mean of (reference - policy)(reference + policy - 2 target): subtracting two means instead
        would leave fp32's rounding of each, which a beta of 5000 makes visible. Where only the reference's errors are
        known there is no other way. Each mean is then off by about 1e-7 of itself: at an error of 0.1 and a beta of
        5000 the margin of a pair by some 5e-5. The gradient is that of -L all the same.
        """
        if self.known_error is not None:
            return self.reference_error() - self.policy_error()
        if self.reference is None:
            raise ValueError("this objective needs a reference, and none was run")
        policy, reference, target = self.policy.float(), self.reference.float(), self.target.float()
        return self._mean((reference - policy) * (reference + policy - 2 * target))

    def pair_metrics(self, margin: Float[Tensor, " pairs"]) -> Metrics:
        """What every objective of pairs logs, by its implicit reward margin (pairs,); a margin of 0 is half right.

        The errors of policy and reference on both sides tell learning from collapse: a policy that learns by getting
        worse at the rejected images alone, or at both, shows there and not in the accuracy.
        """
        seen = margin.detach()
        chosen, rejected = self.policy_error().detach().chunk(2)
        found = {
            "implicit_accuracy": (seen > 0).float() + 0.5 * (seen == 0).float(),
            "reward_margin": seen,
            "policy_error_chosen": chosen,
            "policy_error_rejected": rejected,
        }
        if self.reference is not None or self.known_error is not None:
            chosen, rejected = self.reference_error().chunk(2)
            found |= {"reference_error_chosen": chosen, "reference_error_rejected": rejected}
            found["reference_error"] = (chosen + rejected) / 2
        return found

    def _mean(self, elements: Tensor) -> Tensor:
        return self._scaled(elements.flatten(1).mean(dim=1))

    def _scaled(self, means: Tensor) -> Tensor:
        return means if self.scale is None else self.scale * means


def calibrated(beta: float | str) -> float:
    """An objective's beta as the number that it must be by then; raises ValueError for `auto`."""
    if isinstance(beta, str):
        raise ValueError("beta is still `auto`: the first batch has not been looked at")
    return beta


@runtime_checkable
class Schedule(Protocol):
    """A noise schedule and what the network predicts under it."""

    def sample_t(self, generator: torch.Generator) -> Tensor:
        """One time as the network takes it, of shape ()."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for clean latents, noise (both (rows, C, H, W)) and times (rows,)."""
        ...

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict there."""
        ...

    def to_x0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a prediction implies."""
        ...

    def min_snr(self, t: Tensor, gamma: float) -> Tensor:
        """What errors at times (rows,) are multiplied by under min-SNR weighting; fp32 (rows,)."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """A model family: its network and what turns pixels and prompts into what the network takes, and back."""

    net: Any  # a torch.nn.Module, with diffusers' adapter methods while unwrapped
    schedule: Schedule

    def with_net(self, net: Any) -> Backbone:
        """The same family with another network: a copy, or a wrapped one."""
        ...

    cond_names: ClassVar[tuple[str, ...]]  # the keys of its conditioning

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network takes the guidance scale as an input, so that one forward gives the guided prediction."""
        ...

    def with_guidance(self, scale: float) -> Backbone:
        """The same backbone with another embedded guidance scale; itself where the network takes none."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def resolution(self) -> int:
        """The side in pixels at which the network was trained."""
        ...

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The pipeline's scheduler_config.json, for samplers."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unscaled mean latents (n, C, h, w) fp32 of pixels (n, 3, H, W) in [-1, 1]."""
        ...

    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Mean and log variance of the latents' posterior, one behind the other: (n, 2 C, h, w) fp32, unscaled."""
        ...

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Unscaled latents as the network takes them."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (n, 3, H, W) in [0, 1] of scaled latents."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Cond:
        """One row of conditioning for each prompt."""
        ...

    def encode_unconditional(self, count: int) -> Cond:
        """What guidance's unconditional branch sees, `count` rows: the empty prompt, or what the pipeline takes."""
        ...

    def release_encoders(self) -> None:
        """Let go of what encodes images and prompts; it is loaded again where it is needed."""
        ...

    def overlong(self, prompts: list[str]) -> set[int]:
        """The places of prompts of which a text encoder reads only the beginning."""
        ...

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's prediction, (rows, C, H, W)."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image; raises UserError for a side in pixels that the family cannot take."""
        ...

    def identity(self) -> dict[str, Any]:
        """What latents (`vae`) and text embeddings (`text`) depend on, as hashes."""
        ...

    def save(self, folder: Any, lora: bool) -> None:
        """Write the trained model as its users open it: a pipeline folder, or LoRA weights."""
        ...
