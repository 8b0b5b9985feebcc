"""One optimizer step: examine policy and reference at points, take the objective's loss, apply its gradient.

The loss is divided by the number of items of the whole effective batch, so how that is split into micro-batches and
processes changes nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffpref.data.ahead import Ahead
from diffpref.objectives import Objective
from diffpref.safeguard import safeguarded
from diffpref.train.blame import gradient_offenders
from diffpref.train.config import TrainConfig
from diffpref.train.placing import Placer, Stateless
from diffpref.train.profiling import Region, unmeasured
from diffpref.train.seen import Seen, Told
from diffpref.train.spikes import Spikes
from diffpref.types import Backbone, Batch, Metrics, Outputs, Points, Predict

NOT_FINITE, SPIKE = "not finite", "a spike"  # why a step is not applied


@dataclass(frozen=True)
class Look:
    """Points of a micro-batch and the reference's predictions there, or its errors where these are kept."""

    names: tuple[str, ...]
    points: Points
    known: Tensor | None
    known_error: Tensor | None


@dataclass(frozen=True)
class Step:
    """An optimizer step that was taken.

    entry: what it logs. skipped: why it was not applied, "not finite" or "a spike"; None if it was. items: then the
    names of the items that are to blame, as far as one can tell, which is for a spike those of the largest losses.
    """

    entry: dict[str, float]
    skipped: str | None = None
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Learner:
    """What an optimizer step takes.

    policy: with its net as accelerate prepared it. region: see profiling.py. at_once: how many of this process's items
    of an optimizer step go through the networks at once, a divisor of their number; `train.batch_size` when not given.
    """

    accelerator: Accelerator
    policy: Backbone
    reference: Predict | None
    place: Placer
    data: Ahead
    objective: Objective
    train: TrainConfig
    spikes: Spikes | None = None
    region: Region = unmeasured
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

    def step(self, number: int, optimizer: Any) -> Step:
        """Take step `number`, counted from 0. The host waits for the device once: see seen.py."""
        seen, again, mean_gain = Seen(self.items), [], None
        looks = self._looks(number)
        if self.objective.needs_mean_gain and self.micros > 1:
            waiting = list(looks)
            looks, mean_gain = iter(waiting), self._gain_ahead(waiting)
        for micro, look in enumerate(looks):
            with self._synchronised(last=micro == self.micros - 1):
                losses, metrics = self.descend(look, mean_gain)
            seen.add([place - number * self.items for place in self.places(number, micro)], look.names, losses, metrics)
            if not isinstance(self.place, Stateless):
                again.append(look)  # which cannot be had once more

        with self.region("clip"):
            limit = self.train.max_grad_norm or math.inf
            grad_norm: Any = self.accelerator.clip_grad_norm_(self.policy.net.parameters(), limit)
        with self.region("read"):
            told = seen.read(self.accelerator, grad_norm)
        skipped, items = self._verdict(number, seen, told, again, optimizer)
        with self.region("optimizer"):
            scaler = self.accelerator.scaler
            if skipped == SPIKE and scaler is not None:
                scaler.update()  # as a step would: the gradients are unscaled already
            elif skipped is None or scaler is not None:  # with fp16 what is not finite is the scaler's to refuse
                optimizer.step()
            optimizer.zero_grad()
        entry = {"loss": told.loss, **told.means, "lr": optimizer.param_groups[0]["lr"], "grad_norm": told.grad_norm}
        return Step(entry, skipped, tuple(items))

    def descend(self, look: Look, mean_gain: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """Add the gradient of a micro-batch; its losses and metrics, one for each item. mean_gain: of all items."""
        with self.region("policy forward"):
            outputs = self._examine(look)
        with self.region("loss"):
            if self.objective.needs_mean_gain:
                outputs = replace(outputs, mean_gain=self._mean([outputs]) if mean_gain is None else mean_gain)
            if self.train.sdpo_mu is not None:
                outputs = safeguarded(outputs, self.train.sdpo_mu)
            losses, metrics = self.objective(outputs)
            # DDP averages over processes what it should sum
            total = (losses * look.points.weight).sum() / self.items * self.accelerator.num_processes
        with self.region("backward"):
            self.accelerator.backward(total)
        return losses, metrics

    def _verdict(
        self, number: int, seen: Seen, told: Told, looks: list[Look], optimizer: Any
    ) -> tuple[str | None, list[str]]:
        """Why the step is not to be applied, if so, and the items to blame; the same in every process."""
        if not told.finite_losses:
            return NOT_FINITE, seen.names_at(told.broken)
        if not math.isfinite(told.grad_norm):
            if self.accelerator.scaler is not None:
                return None, []
            looks = looks or [self.look(number, micro) for micro in range(self.micros)]
            return NOT_FINITE, gradient_offenders(self, looks, optimizer)
        if self.spikes and self.spikes.judge(told.loss, told.grad_norm):
            return SPIKE, seen.names_at(told.largest(8))
        return None, []

    def places(self, number: int, micro: int) -> list[int]:
        """The places of this process's items in a micro-batch.

        Which places of an optimizer step are this process's is decided by `batch_size`, whatever `micro` is.
        """
        size, shares, process = self.train.batch_size, self.accelerator.num_processes, self.accelerator.process_index
        own = range(micro * self.micro, (micro + 1) * self.micro)
        return [number * self.items + (item // size * shares + process) * size + item % size for item in own]

    def batch(self, number: int, micro: int) -> Batch:
        """A micro-batch, and the start on reading the one that follows it."""
        after = (number + 1, 0) if micro + 1 == self.micros else (number, micro + 1)
        with self.region("data"):
            return self.data.batch(self.places(number, micro), lambda: self.places(*after))

    def look(self, number: int, micro: int) -> Look:
        """The points of a micro-batch and what the reference predicts there."""
        return self.see(self.batch(number, micro))

    def see(self, batch: Batch) -> Look:
        """The points of a batch and what the reference predicts there."""
        with self.accelerator.autocast():
            with self.region("points"):
                points = self.place(batch)
                if self.train.snr_gamma is not None:
                    points = replace(points, scale=self.policy.schedule.min_snr(points.t, self.train.snr_gamma))
            with self.region("reference forward"):
                known = self.reference(points.x_t, points.t, points.cond) if self.reference else None
        return Look(batch.id, points, known, batch.known_error)

    def _looks(self, number: int) -> Iterator[Look]:
        """The looks of a step's micro-batches. Points that the policy samples are sampled for all of them at once."""
        if isinstance(self.place, Stateless):
            yield from (self.look(number, micro) for micro in range(self.micros))
            return
        batches = [self.batch(number, micro) for micro in range(self.micros)]
        with self.region("sampler"), self.accelerator.autocast():
            self.place.prepare(batches)
        yield from map(self.see, batches)

    def _examine(self, look: Look) -> Outputs:
        points = look.points
        with self.accelerator.autocast():
            predicted = self.policy.predict(points.x_t, points.t, points.cond)
        at = (points.label, points.weight, points.scale)
        return Outputs(predicted, points.target, look.known, *at, known_error=look.known_error)

    @torch.no_grad()
    def _gain_ahead(self, looks: list[Look]) -> Tensor:
        """The mean gain of all micro-batches: one more forward of the policy, without gradients."""
        return self._mean([self._examine(look) for look in looks])

    def _mean(self, outputs: list[Outputs]) -> Tensor:
        gains = torch.cat([entry.gain().detach() for entry in outputs])
        mean: Any = self.accelerator.reduce(gains.mean(), reduction="mean")
        return mean

    def _synchronised(self, last: bool) -> Any:
        """Gradients travel between processes only with the last micro-batch."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy.net)
