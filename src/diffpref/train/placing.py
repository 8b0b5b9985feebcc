"""From the configuration's points to what makes them during a run, with or without a state of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from diffpref.points import Inverted, Placement, Replay
from diffpref.train.config import TrainConfig
from diffpref.train.replay import ReplayBuffer, Share
from diffpref.types import Backbone, Batch, Points, Predict


@runtime_checkable
class Placer(Protocol):
    """Makes the points of a micro-batch. Its state is part of a checkpoint."""

    def __call__(self, batch: Batch) -> Points: ...

    def prepare(self, batches: list[Batch]) -> None:
        """Hear of all micro-batches of an optimizer step, before the points of the first are asked for."""
        ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor]) -> None: ...

    def mark(self) -> Any:
        """What `back_to` needs to take an optimizer step again as if it had not been tried."""
        ...

    def back_to(self, mark: Any) -> None: ...


@dataclass(frozen=True)
class Stateless:
    """Points that are functions of the batch alone."""

    place: Callable[[Batch], Points]

    def __call__(self, batch: Batch) -> Points:
        return self.place(batch)

    def prepare(self, batches: list[Batch]) -> None:
        """Nothing to prepare."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""

    def mark(self) -> None:
        """Nothing to remember."""

    def back_to(self, mark: None) -> None:
        """Nothing to forget."""


def make_placer(
    points: Placement, backbone: Backbone, reference: Predict | None, train: TrainConfig, accelerator: Any
) -> Placer:
    """backbone: the policy, not wrapped for several processes."""
    if isinstance(points, Replay):
        share = Share(
            train.batch_size, train.gradient_accumulation_steps, accelerator.process_index, accelerator.num_processes
        )
        return ReplayBuffer(points, backbone, share, accelerator.gather, steady=train.compile)
    if isinstance(points, Inverted):
        return Stateless(lambda batch: points(batch, backbone.schedule, backbone.predict))
    return Stateless(lambda batch: points(batch, backbone.schedule))
