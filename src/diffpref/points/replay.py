"""Points on the policy's own denoising trajectories, beside noised expert images (Diffusion-DRO, arXiv 2510.18353).

The defaults are those of the published code (basiclab/DiffusionDRO, `train.py`), which counts in micro-steps of batch 4
with an accumulation of 16, and per process; ours counts optimizer steps and places in the effective batch, so that how
the batch is split changes nothing. There, a buffer of 4 filled by one batch of 4 each micro-step holds just that batch:
`trajectories` 1 and `refresh_steps` 1. A policy copied every 16 micro-steps is, at an accumulation of 16, always the
current one: `policy_copy_steps` 1. What makes the points is train/replay.py, for it holds a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffpref.traits import PlacementTraits


@dataclass(frozen=True)
class Replay(PlacementTraits):
    """An expert image with fresh noise, and a step of a trajectory that the policy sampled for its prompt."""

    sampler: Literal["dpmsolver++", "ddim", "ddpm", "flow"] = "dpmsolver++"
    """How trajectories are sampled; `flow` (Euler) is the one of rectified flows, and the only one they have."""
    steps: int = 20
    """Denoising steps of a trajectory."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the sampling, then of the recorded prediction too; 1 or below is none."""
    perturb: bool = True
    """Move the times of each trajectory by less than a step at random, so that all times are visited."""
    trajectories: int = 1
    """How many of its latest trajectories each place in the effective batch keeps, on the CPU; one is drawn."""
    refresh_steps: int = 1
    """Optimizer steps from one new trajectory of a place to the next; between them, the kept ones are replayed."""
    policy_copy_steps: int = 1
    """Optimizer steps for which the same copy of the policy samples; 1 samples with the current weights, uncopied."""
    sampled_at_once: int = 16
    """At most so many items of an optimizer step, whatever its micro-batches, are sampled together: more is faster, and
    takes memory (a few rows of a forward without gradients each)."""
    offline_share: float = 0.0
    """Share of items whose second image is the rejected one of a pair of the data instead; above 0 it needs pairs."""
    name: Literal["replay"] = "replay"
    positive: ClassVar[tuple[str, ...]] = (
        "steps",
        "trajectories",
        "refresh_steps",
        "policy_copy_steps",
        "sampled_at_once",
    )
    not_negative: ClassVar[tuple[str, ...]] = ("guidance_scale",)
    below_one: ClassVar[tuple[str, ...]] = ("offline_share",)

    @property
    def takes_pairs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  for this kind, a setting decides
        """Whether the data must be pairs."""
        return self.offline_share > 0
