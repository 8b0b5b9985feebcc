"""One optimizer step: examine policy and reference at points, take the objective's loss, apply its gradient.

The loss is divided by the number of items of the whole effective batch, so how that is split into micro-batches and
processes changes nothing.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffpref.data.ahead import Ahead
from diffpref.objectives import Objective
from diffpref.safeguard import safeguarded
from diffpref.train.config import TrainConfig
from diffpref.train.placing import Placer
from diffpref.types import Backbone, Batch, Metrics, Outputs, Points, Predict


@dataclass(frozen=True)
class Look:
    """Points of a micro-batch and the reference's predictions there."""

    names: tuple[str, ...]
    points: Points
    known: Tensor | None


@dataclass(frozen=True)
class Learner:
    """What an optimizer step takes.

    policy: with its net as accelerate prepared it. at_once: how many of this process's items of an optimizer step go
    through the networks at once, a divisor of their number; `train.batch_size` when not given.
    """

    accelerator: Accelerator
    policy: Backbone
    reference: Predict | None
    place: Placer
    data: Ahead
    objective: Objective
    train: TrainConfig
    at_once: int | None = None

    @property
    def micro(self) -> int:
        """The items of a micro-batch."""
        return self.at_once or self.train.batch_size

    @property
    def micros(self) -> int:
        """How many micro-batches an optimizer step has in this process."""
        return self.train.batch_size * self.train.gradient_accumulation_steps // self.micro

    @property
    def items(self) -> int:
        """The items of an optimizer step: batch x accumulation x processes."""
        return self.train.batch_size * self.train.gradient_accumulation_steps * self.accelerator.num_processes

    def step(self, number: int, optimizer: Any) -> tuple[dict[str, float], list[str], bool]:
        """Step `number` (from 0): what it logs, the items whose loss was not finite, and whether it was applied."""
        micros = self.micros
        waiting = self._gain_ahead(number) if self.objective.needs_mean_gain and micros > 1 else None
        seen: dict[str, list[Tensor]] = {}
        offenders: list[str] = []
        for micro in range(micros):
            with self._synchronised(last=micro == micros - 1):
                look = waiting.looks[micro] if waiting else self.look(number, micro)
                losses, metrics = self.descend(look, waiting.mean if waiting else None)
            offenders += [name for name, fine in zip(look.names, losses.isfinite().tolist(), strict=True) if not fine]
            for name, values in {"loss": losses.detach(), **metrics}.items():
                seen.setdefault(name, []).append(values)

        limit = self.train.max_grad_norm or math.inf
        grad_norm: Any = self.accelerator.clip_grad_norm_(self.policy.net.parameters(), limit)
        entry = self._averages(seen)
        entry |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": float(grad_norm)}
        fp16 = self.accelerator.scaler is not None  # then an infinite gradient is the scaler's to refuse
        finite = math.isfinite(entry["loss"]) and (fp16 or math.isfinite(entry["grad_norm"]))
        if finite or fp16:
            optimizer.step()
        optimizer.zero_grad()
        return entry, offenders, finite

    def descend(self, look: Look, mean_gain: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """Add the gradient of a micro-batch; its losses and metrics, one for each item. mean_gain: of all items."""
        outputs = self._examine(look)
        if self.objective.needs_mean_gain:
            outputs = replace(outputs, mean_gain=self._mean([outputs]) if mean_gain is None else mean_gain)
        if self.train.sdpo_mu is not None:
            outputs = safeguarded(outputs, self.train.sdpo_mu)
        losses, metrics = self.objective(outputs)
        # DDP averages over processes what it should sum
        total = (losses * look.points.weight).sum() / self.items * self.accelerator.num_processes
        self.accelerator.backward(total)
        return losses, metrics

    def places(self, number: int, micro: int) -> list[int]:
        """The places of this process's items in a micro-batch.

        Which places of an optimizer step are this process's is decided by `batch_size`, whatever `micro` is.
        """
        size, shares, process = self.train.batch_size, self.accelerator.num_processes, self.accelerator.process_index
        own = range(micro * self.micro, (micro + 1) * self.micro)
        return [number * self.items + (item // size * shares + process) * size + item % size for item in own]

    def look(self, number: int, micro: int) -> Look:
        """The points of a micro-batch and what the reference predicts there."""
        after = (number + 1, 0) if micro + 1 == self.micros else (number, micro + 1)
        return self.see(self.data.batch(self.places(number, micro), lambda: self.places(*after)))

    def see(self, batch: Batch) -> Look:
        """The points of a batch and what the reference predicts there."""
        with self.accelerator.autocast():
            points = self.place(batch)
            if self.train.snr_gamma is not None:
                points = replace(points, scale=self.policy.schedule.min_snr(points.t, self.train.snr_gamma))
            known = self.reference(points.x_t, points.t, points.cond) if self.reference else None
        return Look(batch.id, points, known)

    def _examine(self, look: Look) -> Outputs:
        points = look.points
        with self.accelerator.autocast():
            predicted = self.policy.predict(points.x_t, points.t, points.cond)
        return Outputs(predicted, points.target, look.known, points.label, points.weight, points.scale)

    def _gain_ahead(self, number: int) -> _Waiting:
        """All micro-batches' looks and their mean gain: one more forward of the policy, without gradients."""
        looks = [self.look(number, micro) for micro in range(self.micros)]
        with torch.no_grad():
            return _Waiting(looks, self._mean([self._examine(look) for look in looks]))

    def _mean(self, outputs: list[Outputs]) -> Tensor:
        gains = torch.cat([entry.gain().detach() for entry in outputs])
        mean: Any = self.accelerator.reduce(gains.mean(), reduction="mean")
        return mean

    def _averages(self, seen: dict[str, list[Tensor]]) -> dict[str, float]:
        """The mean of each metric over the items of all processes that have it (NaN: they have not).

        The loss alone keeps its NaN, which a broken item gives.
        """
        values = [torch.cat(entries).double() for entries in seen.values()]
        sums = torch.stack([entries.nansum() for entries in values])
        counts = torch.stack([(~entries.isnan()).sum() for entries in values])
        sums[0], counts[0] = values[0].sum(), values[0].numel()
        reduced: Any = self.accelerator.reduce(torch.stack([sums, counts.double()]), reduction="sum")
        found = dict(zip(seen, (reduced[0] / reduced[1]).tolist(), strict=True))
        return {name: value for name, value in found.items() if name == "loss" or not math.isnan(value)}

    def _synchronised(self, last: bool) -> Any:
        """Gradients travel between processes only with the last micro-batch."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy.net)


@dataclass(frozen=True)
class _Waiting:
    looks: list[Look]
    mean: Tensor
