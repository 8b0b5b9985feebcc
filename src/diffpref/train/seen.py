"""What the host reads of an optimizer step: one tensor, once, whatever the number of micro-batches and processes.

Each read of a tensor on a GPU waits for all that the GPU has been given, and meanwhile nothing is given to it. So the
losses and metrics of the micro-batches stay where they are until the last one is done, and come over together with the
gradient's norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from diffpref.moving import on_device
from diffpref.types import Metrics


@dataclass(frozen=True)
class Told:
    """What has been read. losses: of each item of the step, by its position in it; means: of the metrics that are."""

    losses: list[float]
    means: dict[str, float]
    grad_norm: float

    @property
    def loss(self) -> float:
        """The mean over the items; NaN where a broken item makes it so."""
        return math.fsum(self.losses) / len(self.losses) if self.finite_losses else math.nan

    @property
    def finite_losses(self) -> bool:
        return all(map(math.isfinite, self.losses))

    @property
    def broken(self) -> list[int]:
        """The positions of the items whose loss is not finite."""
        return [position for position, loss in enumerate(self.losses) if not math.isfinite(loss)]

    def largest(self, count: int) -> list[int]:
        """The positions of the items with the largest losses."""
        return sorted(range(len(self.losses)), key=lambda position: -self.losses[position])[:count]


@dataclass(frozen=True)
class Seen:
    """The losses and metrics of a step's micro-batches on this process, as they come.

    items: of the whole step, of all processes.
    """

    items: int
    names: dict[int, str] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, positions: list[int], names: tuple[str, ...], losses: Tensor, metrics: Metrics) -> None:
        """Take in a micro-batch: the positions of its items in the step, their names, losses and metrics."""
        self.names.update(zip(positions, names, strict=True))
        self.losses.append(losses.detach())
        for name, values in metrics.items():
            self.metrics.setdefault(name, []).append(values)

    def read(self, accelerator: Accelerator, grad_norm: Tensor) -> Told:
        """Everything of all processes, in one reading. A metric's mean is over the items that have it (NaN: not)."""
        own = torch.cat(self.losses).double()
        # each process has zeros where the others' items stand, so the sum of all is whole
        losses = own.new_zeros(self.items).index_copy(0, on_device(list(self.names), own.device), own)
        values = [torch.cat(entries).double() for entries in self.metrics.values()]
        sums = [entries.nansum() for entries in values]
        counts = [(~entries.isnan()).sum().double() for entries in values]
        reduced: Any = accelerator.reduce(torch.cat([losses, *(part[None] for part in sums + counts)]), reduction="sum")
        read = torch.cat([reduced, grad_norm.detach().to(reduced)[None]]).tolist()  # the one wait for the device
        many, total = len(self.metrics), self.items
        pairs = zip(self.metrics, read[total : total + many], read[total + many : total + 2 * many], strict=True)
        return Told(read[:total], {name: sum_ / count for name, sum_, count in pairs if count}, read[-1])

    def names_at(self, positions: list[int]) -> list[str]:
        """The names of the items at these positions, which may be other processes': every process must call it."""
        held: Any = gather_object(
            [(position, self.names[position]) for position in positions if position in self.names]
        )
        known = dict(held)
        return [known[position] for position in positions]
