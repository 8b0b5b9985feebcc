"""The replay buffer of Diffusion-DRO (arXiv 2510.18353): expert images beside the policy's own denoising steps.

A place of the effective batch keeps its own trajectories, and what happens there depends on the draws of the items that
came to it and on the weights at the time. So the points do not depend on how the effective batch is split. The
published buffer draws its rows from whatever its process sampled lately; at its published settings that is each item's
own new trajectory, as here. Then nothing is kept, and no item is sampled further than to the step drawn for it.

The target of the policy's half is what the policy predicted there: in prediction space, so a velocity for models that
predict one, and after guidance where there is any. Published is epsilon alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from diffpref.data.threads import groups
from diffpref.draws import generator, uniform
from diffpref.moving import on_device, to_device
from diffpref.points import Replay
from diffpref.solvers import Visit, check_sampler, make_solver, walk
from diffpref.types import Backbone, Batch, Cond, Points


@dataclass(frozen=True)
class Share:
    """This process's share of an optimizer step of micros x processes x size items, in that order."""

    size: int
    micros: int = 1
    process: int = 0
    processes: int = 1

    @property
    def items(self) -> int:
        """How many items of an optimizer step are this process's."""
        return self.size * self.micros

    def places(self, process: int) -> list[int]:
        """A process's places in the effective batch, in the order in which it takes them."""
        starts = [(micro * self.processes + process) * self.size for micro in range(self.micros)]
        return [start + row for start in starts for row in range(self.size)]


@dataclass(frozen=True)
class Rows:
    """Expert images with their conditioning, and a point of a trajectory for each. All of n rows."""

    items: list[int]  # which items of a batch they are
    latents: Tensor
    cond: Cond
    weight: Tensor
    x_t: Tensor
    t: Tensor
    target: Tensor


@dataclass
class Kept:
    """The latest trajectories of this process's places, on the CPU.

    tensors: what is kept, each (places, trajectories, ...). count: (places,) int64, how many there have been.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    count: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @staticmethod
    def of(places: int, depth: int, batch: Batch, steps: int, time: torch.dtype) -> Kept:
        """Room for the trajectories of items like those of a batch."""

        def room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(places, depth, *shape, dtype=dtype)

        shape = batch.latents.shape[1:]
        tensors = {name: room((steps, *shape), torch.float32) for name in ("x_t", "target")}
        tensors |= {"t": room((steps,), time), "latents": room(shape, torch.float32), "weight": room((), torch.float32)}
        tensors |= {f"cond.{name}": room(rows.shape[1:], rows.dtype) for name, rows in batch.cond.items()}
        return Kept(tensors, torch.zeros(places, dtype=torch.int64))

    def push(self, places: Tensor, entries: dict[str, Tensor]) -> None:
        """Put one trajectory to each of these places, in place of its oldest."""
        for name, kept in self.tensors.items():
            kept[places, self.count[places] % kept.shape[1]] = entries[name].detach().cpu()
        self.count[places] += 1

    def pick(self, places: Tensor, ages: Tensor) -> dict[str, Tensor]:
        """The trajectories that came `ages` before each place's newest."""
        at = self.count[places] - 1 - ages
        return {name: kept[places, at % kept.shape[1]] for name, kept in self.tensors.items()}


@dataclass(frozen=True)
class Mark:
    """Where a buffer stood: items seen, the copied policy, and how many trajectories each place had."""

    seen: int
    copies: dict[str, Tensor]
    kept: Kept


class ReplayBuffer:
    """Makes points from expert images by a policy that samples for itself, micro-batch after micro-batch.

    backbone: the policy, not wrapped for several processes. gather: joins a tensor of all processes along its first
    dimension, on all of them; needed with several processes, for `state` alone. steady: the sampled batch keeps its
    size to the end, as a compiled network wants.
    Raises UserError for a model that the points cannot be made with.
    """

    def __init__(
        self,
        points: Replay,
        backbone: Backbone,
        share: Share,
        gather: Callable[[Tensor], Tensor] | None = None,
        steady: bool = False,
    ) -> None:
        check_sampler(points.sampler, backbone.schedule)
        self._steady, self._ready = steady, list[Rows]()
        self.points, self.backbone, self.share, self.gather = points, backbone, share, gather or (lambda own: own)
        self.trained = {name: value for name, value in backbone.net.named_parameters() if value.requires_grad}
        self.seen = 0  # items of this process
        self.copies: dict[str, Tensor] = {}
        self.kept = Kept()
        self._sampled_with, self._empty = backbone, None
        if points.guidance_scale > 1 and backbone.embeds_guidance:
            self._sampled_with = backbone.with_guidance(points.guidance_scale)
        elif points.guidance_scale > 1:
            self._empty = backbone.encode_unconditional(1)

    def prepare(self, batches: list[Batch]) -> None:
        """Sample for all micro-batches of the coming optimizer step together; calls then take what was sampled."""
        self._ready = self._found(batches)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Points:
        """Points of 2 n rows for n items: expert images first. Raises ValueError for items of the wrong kind."""
        schedule, items, device = self.backbone.schedule, len(batch.draw), batch.latents.device
        found = self._ready.pop(0) if self._ready else self._found([batch])[0]
        self.seen += items
        online = on_device(found.items, device, torch.int64)

        def put(rows: Tensor, values: Tensor) -> Tensor:
            return rows.index_copy(0, online, to_device(values, device).to(rows.dtype))

        x0, other = put(batch.latents[:items], found.latents), batch.latents[-items:]
        noise = torch.stack([torch.randn(x0.shape[1:], generator=generator(draw, "noise")) for draw in batch.draw])
        noise = to_device(noise, device)
        drawn = torch.stack([schedule.sample_t(generator(draw, "time")) for draw in batch.draw])
        t = put(to_device(drawn, device), found.t)
        return Points(
            x_t=torch.cat([schedule.add_noise(x0, noise, t), put(schedule.add_noise(other, noise, t), found.x_t)]),
            t=torch.cat([t, t]),
            target=torch.cat([schedule.target(x0, noise, t), put(schedule.target(other, noise, t), found.target)]),
            cond={
                name: torch.cat([put(rows[:items], found.cond[name]), put(rows[-items:], found.cond[name])])
                for name, rows in batch.cond.items()
            },
            label=batch.label.index_fill(0, online, 1.0),  # an expert image is the better one
            weight=put(batch.weight, found.weight),
        )

    def state(self) -> dict[str, Tensor]:
        """All that the next points depend on, of all processes: every process must call it. After whole steps only."""
        kept = {"count": self.kept.count, **self.kept.tensors} if self.kept.tensors else {}
        found = {"step": torch.tensor(self.seen // self.share.items)}
        found |= {f"policy.{name}": value.cpu() for name, value in self.copies.items()}
        order = torch.tensor([place for p in range(self.share.processes) for place in self.share.places(p)]).argsort()
        for name, own in kept.items():
            found[f"kept.{name}"] = self.gather(own.to(self.backbone.device)).cpu()[order].contiguous()
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`, whatever the processes and micro-batches were that made it."""
        self.seen = int(state["step"]) * self.share.items
        self.copies = {
            name: state[f"policy.{name}"].to(value.device)
            for name, value in self.trained.items()
            if f"policy.{name}" in state
        }
        own = torch.tensor(self.share.places(self.share.process))
        kept = {name.removeprefix("kept."): rows[own] for name, rows in state.items() if name.startswith("kept.")}
        self.kept = Kept()
        if kept:
            self.kept = Kept(count=kept.pop("count"), tensors=kept)

    def mark(self) -> Mark:
        """Where this stands before an optimizer step, for `back_to`."""
        return Mark(self.seen, dict(self.copies), Kept(self.kept.tensors, self.kept.count.clone()))

    def back_to(self, mark: Mark) -> None:
        """Forget what came since, to take the same step again with the same weights.

        New trajectories that were kept are not taken out: they stand where the same items will put theirs again.
        """
        self.seen, self.copies, self._ready = mark.seen, dict(mark.copies), []
        self.kept = Kept(mark.kept.tensors, mark.kept.count.clone())

    @torch.no_grad()
    def _found(self, batches: list[Batch]) -> list[Rows]:
        """Rows for each of these batches, the next ones of an optimizer step, whose items are sampled together."""
        points = self.points
        for batch in batches:
            if len(batch.latents) != (2 if points.takes_pairs else 1) * len(batch.draw):
                kind, given = "pairs" if points.takes_pairs else "single images", len(batch.latents)
                raise ValueError(f"these replay points need {kind}, not {given} rows for {len(batch.draw)} items")
        step, first = divmod(self.seen, self.share.items)  # of its items of this step, the first of these batches
        if first == 0 and points.policy_copy_steps > 1 and step % points.policy_copy_steps == 0:
            self.copies = {name: value.detach().clone() for name, value in self.trained.items()}
        online = [
            [i for i, draw in enumerate(batch.draw) if uniform(draw, "offline") >= points.offline_share]
            for batch in batches
        ]
        starts = accumulate((len(batch.draw) for batch in batches), initial=first)
        places = [start + i for start, items in zip(starts, online, strict=False) for i in items]
        experts = _joined([_of(batch, items) for batch, items in zip(batches, online, strict=True)])
        if points.trajectories == points.refresh_steps == 1:
            x_t, t, target = self._fresh(experts)
            made = Rows(places, experts.latents, experts.cond, experts.weight, x_t, t, target)
        else:
            if not self.kept.tensors:
                self.kept = Kept.of(self.share.items, points.trajectories, experts, points.steps, self._dtype_of_t())
            made = self._replayed(experts, places, step % points.refresh_steps == 0)
        return _shared_out(made, online)

    def _fresh(self, experts: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t and target at a point of each item's own new trajectory, sampled no further than to there."""
        device, last = experts.latents.device, self._drawn_steps(experts)
        x_t, target = torch.empty_like(experts.latents), torch.empty_like(experts.latents)
        t = torch.zeros(len(last), dtype=self._dtype_of_t(), device=device)
        with self._sampling_policy():
            for group in self._groups(last):
                for visit in self._trajectories(_of(experts, group), [last[item] for item in group]):
                    there = [row for row, item in enumerate(visit.items) if last[group[item]] == visit.index]
                    if there:
                        arrived = on_device([group[visit.items[row]] for row in there], device, torch.int64)
                        rows = on_device(there, device, torch.int64)
                        x_t[arrived], t[arrived] = visit.x_t[rows], visit.t[rows]
                        target[arrived] = visit.prediction[rows]
        return x_t, t, target

    def _groups(self, last: list[int]) -> list[list[int]]:
        """The items in groups that are sampled at once: such as go about equally far."""
        order = sorted(range(len(last)), key=lambda item: -last[item])
        return list(groups(order, self.points.sampled_at_once))

    def _replayed(self, experts: Batch, places: list[int], due: bool) -> Rows:
        """A point of one of the trajectories that each item's place keeps, after new ones where they are due."""
        at = torch.tensor(places, dtype=torch.int64)
        counts = self.kept.count[at].tolist()
        wanted = [item for item, count in enumerate(counts) if due or not count]
        with self._sampling_policy():
            for group in groups(wanted, self.points.sampled_at_once):
                self._keep(_of(experts, group), at[group])
        depths = self.kept.count[at].clamp(max=self.points.trajectories).tolist()
        ages = [int(uniform(draw, "trajectory age") * depth) for draw, depth in zip(experts.draw, depths, strict=True)]
        found = self.kept.pick(at, torch.tensor(ages, dtype=torch.int64))
        there = torch.arange(len(places)), torch.tensor(self._drawn_steps(experts), dtype=torch.int64)
        return Rows(
            items=places,
            latents=found["latents"],
            cond={name: found[f"cond.{name}"] for name in experts.cond},
            weight=found["weight"],
            x_t=found["x_t"][there],
            t=found["t"][there],
            target=found["target"][there],
        )

    def _keep(self, experts: Batch, places: Tensor) -> None:
        """Sample a whole new trajectory for each of these places, and keep it."""
        last = [self.points.steps - 1] * len(places)
        path = [(visit.x_t, visit.t, visit.prediction) for visit in self._trajectories(experts, last)]
        x_t, t, target = (torch.stack(values, dim=1) for values in zip(*path, strict=True))
        entries = {"x_t": x_t, "t": t, "target": target, "latents": experts.latents, "weight": experts.weight}
        self.kept.push(places, entries | {f"cond.{name}": rows for name, rows in experts.cond.items()})

    def _trajectories(self, experts: Batch, last: list[int]) -> Iterator[Visit]:
        """The steps of a new trajectory for each item."""
        points, shape, device = self.points, experts.latents.shape[1:], experts.latents.device
        config, schedule = self.backbone.scheduler_config, self.backbone.schedule
        jitter = torch.tensor([uniform(draw, "trajectory jitter") for draw in experts.draw], dtype=torch.float64)
        height, width = shape[1:]
        solver = make_solver(points.sampler, schedule, config, points.steps, jitter, points.perturb, (height, width))
        generators = [generator(draw, "trajectory") for draw in experts.draw]
        start = to_device(torch.stack([torch.randn(shape, generator=each) for each in generators]), device)
        noise = None
        if points.sampler == "ddpm":
            drawn = torch.stack([torch.randn(points.steps, *shape, generator=each) for each in generators])
            noise = to_device(drawn, device)
        yield from walk(self._predict, solver.to(device), start, experts.cond, last, noise, self._steady)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self._empty is None:
            return self._sampled_with.predict(x_t, t, cond)
        empty = {name: rows.expand(len(x_t), *rows.shape[1:]) for name, rows in self._empty.items()}
        both = {name: torch.cat([empty[name].to(rows), rows]) for name, rows in cond.items()}
        without, told = self._sampled_with.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).float().chunk(2)
        return without + self.points.guidance_scale * (told - without)

    @contextlib.contextmanager
    def _sampling_policy(self) -> Iterator[None]:
        """Sample with the copied weights, if there are any: the trained tensors change places with them for that time.

        Autocast's cache knows a weight by its tensor alone, so it would go on with the copy's, or with casts of the
        weights that were made without gradients.
        """
        self._swap()
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            self._swap()
            torch.clear_autocast_cache()

    def _swap(self) -> None:
        for name, copied in self.copies.items():
            value = self.trained[name]
            value.data, self.copies[name] = copied, value.data

    def _drawn_steps(self, experts: Batch) -> list[int]:
        return [int(uniform(draw, "trajectory step") * self.points.steps) for draw in experts.draw]

    def _dtype_of_t(self) -> torch.dtype:
        return torch.float32 if self.points.sampler == "flow" else torch.int64


def _of(batch: Batch, items: list[int]) -> Batch:
    """The preferred images of some items."""
    rows = on_device(items, batch.latents.device, torch.int64)
    return Batch(
        latents=batch.latents[rows],
        cond={name: value[rows] for name, value in batch.cond.items()},
        label=batch.label[rows],
        weight=batch.weight[rows],
        id=tuple(batch.id[i] for i in items),
        draw=tuple(batch.draw[i] for i in items),
    )


def _joined(batches: list[Batch]) -> Batch:
    """The items of several batches of single images as one batch."""
    return Batch(
        latents=torch.cat([batch.latents for batch in batches]),
        cond={name: torch.cat([batch.cond[name] for batch in batches]) for name in batches[0].cond},
        label=torch.cat([batch.label for batch in batches]),
        weight=torch.cat([batch.weight for batch in batches]),
        id=tuple(name for batch in batches for name in batch.id),
        draw=tuple(draw for batch in batches for draw in batch.draw),
    )


def _shared_out(rows: Rows, online: list[list[int]]) -> list[Rows]:
    """The rows of several batches' items, batch by batch."""
    sizes = [len(items) for items in online]

    def parts(values: Tensor) -> tuple[Tensor, ...]:
        return values.split(sizes)

    cond = {name: parts(values) for name, values in rows.cond.items()}
    others = [parts(values) for values in (rows.latents, rows.weight, rows.x_t, rows.t, rows.target)]
    return [
        Rows(items, latents, {name: values[i] for name, values in cond.items()}, weight, x_t, t, target)
        for i, (items, latents, weight, x_t, t, target) in enumerate(zip(online, *others, strict=True))
    ]
