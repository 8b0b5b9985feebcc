"""From a dataset and its latents to batches. The sample at a place is arithmetic: nothing here depends on what was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.order import Order
from diffpref.data.reference_errors import Asked, ReferenceErrors
from diffpref.data.threads import groups
from diffpref.data.views import Encoded, View
from diffpref.draws import draw_seed, permutation, uniform
from diffpref.train.config import DataConfig
from diffpref.types import Backbone, Batch, Items


@dataclass(frozen=True)
class Sample:
    """An item at a place: its name, draw, label and weight, and of each of its rows in a batch image and prompt."""

    name: str
    draw: int
    label: float
    weight: float
    views: tuple[View, ...]
    prompts: tuple[str, ...]


def asked(samples: list[Sample]) -> list[Asked]:
    """The rows of a batch of these samples, as the reference's errors are kept of them."""
    halves = range(len(samples[0].views))
    return [Asked(s.views[half], s.prompts[half], s.draw) for half in halves for s in samples]


@dataclass(frozen=True)
class Loader:
    """Batches of items made of the chosen rows of a dataset, in an order that the seed fixes.

    items: "pairs", two rows of a batch each; "liked", the preferred image of a pair or a single image; "judged", single
    images with label 1 or 0, of a pair both.
    store: what the images and prompts are read from, the latent store or the encoders themselves.
    run: how many places in a row have one shape where there are several, the items of an optimizer step.
    draws: how many draws an item has, which come in turn; 0 for one that is new each time.
    errors: where the reference's errors are kept, if they are.
    """

    dataset: PreferenceDataset
    store: Encoded
    backbone: Backbone
    data: DataConfig
    rows: list[int]
    seed: int
    items: Items
    run: int = 1
    draws: int = 0
    errors: ReferenceErrors | None = None

    def __len__(self) -> int:
        """The number of items of an epoch."""
        return len(self.rows) * self._items_of_a_row

    def batch(self, places: list[int]) -> Batch:
        """The samples at these places; place p is number p mod n of epoch p // n, with n items.

        Raises ValueError for places of several shapes. An item that cannot be read, which only an uncached run can
        meet, is replaced by the next of its shape that can, under the draw of its own place: so the sample at a place
        remains a function of the place.
        """
        return self.deliver(self.collect(places))

    def collect(self, places: list[int]) -> Batch:
        """The batch with unscaled latents on the CPU, in pinned memory for a GPU: all of it that a thread may do."""
        samples = self.samples(places)
        halves = range(len(samples[0].views))
        latents, unreadable = self.store.read([sample.views[half] for half in halves for sample in samples])
        for number in sorted({row % len(places) for row in unreadable}):
            later, wrong = 0, unreadable
            while wrong:
                later += 1
                samples[number] = self._sample(places[number], later)
                latents[number :: len(places)], wrong = self.store.read(list(samples[number].views))
        return self._collate(samples, latents)

    def batches(self, places: Iterable[int], size: int) -> Iterator[list[int]]:
        """These places in lists of at most `size` that have one shape."""
        shapes: dict[int, list[int]] = {}
        for place in places:
            row = self.rows[self._order.item(place) // self._items_of_a_row]
            shapes.setdefault(int(self.store.buckets.of_row[row]), []).append(place)
        for alike in shapes.values():
            yield from groups(alike, size)

    def samples(self, places: Iterable[int]) -> list[Sample]:
        """What stands at these places, without reading it."""
        return [self._sample(place) for place in places]

    def shapes(self) -> list[int]:
        """How many items each bucket has, in the order of the store's sizes."""
        return [count * self._items_of_a_row for count in self.store.buckets.counts(self.rows)]

    @cached_property
    def _order(self) -> Order:
        of_item = np.repeat(self.store.buckets.of_row[self.rows], self._items_of_a_row)
        members = tuple(np.flatnonzero(of_item == bucket) for bucket in np.unique(of_item))
        return Order(self.seed, members, self.run, self.data.shuffle_block if self.data.shuffle == "block" else None)

    @property
    def _items_of_a_row(self) -> int:
        return 2 if self.items == "judged" and self.dataset.kind == "pairs" else 1

    def _sample(self, place: int, later: int = 0) -> Sample:
        """The item at a place, or the one that stands so much later in its epoch's order, with the place's draw."""
        which, half = divmod(self._order.item(place, later), self._items_of_a_row)
        row = self.rows[which]
        sides, label = self._ordered(row)
        name = self.dataset.ids[row]
        if self.items == "judged":
            if self.data.ties != "soft":
                label = float(label > 0.5)
            if self.dataset.kind == "pairs":
                name = f"{name}:{self.dataset.sides[sides[half]]}"
            sides, label = [sides[half]], (label, 1 - label)[half]
        elif self.items == "liked":
            sides = sides[:1]
        draw = self._draw(place, name)
        dropped = uniform(draw, "prompt") < self.data.prompt_dropout
        prompts = ["" if dropped else self.dataset.caption(row, self.dataset.sides[side]) for side in sides]
        weight = float(self.dataset.weights[row])
        return Sample(name, draw, label, weight, self._views(row, sides, draw), tuple(prompts))

    def _draw(self, place: int, name: str) -> int:
        """The draw of the item `name` at a place: a new one, or one of its few, which come equally often."""
        if not self.draws:
            return draw_seed(self.seed, "sample", *divmod(place, len(self)))
        round_, k = divmod(self._order.turn(place), self.draws)
        order = permutation(draw_seed(self.seed, "draws", name), round_, self.draws)
        return draw_seed("kept draw", name, int(order[k]))

    def _ordered(self, row: int) -> tuple[list[int], float]:
        """The sides of a row, the likelier winner first, and the probability that it is one."""
        sides, label = list(range(len(self.dataset.sides))), float(self.dataset.labels[row])
        if label == 0.5 and self.data.ties == "random":
            label = float(uniform(draw_seed(self.seed, self.dataset.ids[row]), "tie") < 0.5)
        if self.dataset.kind == "pairs" and label < 0.5:
            return sides[::-1], 1 - label
        return sides, label

    def _views(self, row: int, sides: list[int], draw: int) -> tuple[View, ...]:
        """How the images are mirrored and cropped: all alike, or each by draws of its own."""
        views = []
        for half, side in zip(("chosen", "rejected"), sides, strict=False):
            apart = self.data.augmentation == "independent" and len(sides) > 1
            whose = f" {half}" if apart else ""
            mirrored = self.data.flip and uniform(draw, f"flip{whose}") < 0.5
            view = View(row, side, mirrored)
            if self.data.crop == "random":
                view = replace(view, left=uniform(draw, f"left{whose}"), top=uniform(draw, f"top{whose}"))
            if self.data.latents == "moments":  # each image's own, as the published scripts sample them
                view = replace(view, seed=draw_seed(draw, f"posterior {half}"))
            views.append(view)
        return tuple(views)

    def deliver(self, batch: Batch) -> Batch:
        """A collected batch on the device, its latents scaled."""
        device = self.backbone.device
        known = batch.known_error
        return replace(
            batch,
            latents=self.backbone.scale_latents(batch.latents.to(device, non_blocking=True)),
            cond={name: part.to(device, non_blocking=True) for name, part in batch.cond.items()},
            label=batch.label.to(device, non_blocking=True),
            weight=batch.weight.to(device, non_blocking=True),
            known_error=None if known is None else known.to(device, non_blocking=True),
        )

    def _collate(self, samples: list[Sample], latents: Tensor) -> Batch:
        halves = range(len(samples[0].views))
        cond = self.store.prompts([sample.prompts[half] for half in halves for sample in samples])
        pin = self._pinned
        return Batch(
            latents=pin(latents),
            cond={name: pin(part) for name, part in cond.items()},
            label=pin(torch.tensor([sample.label for sample in samples], dtype=torch.float32)),
            weight=pin(torch.tensor([sample.weight for sample in samples], dtype=torch.float32)),
            id=tuple(sample.name for sample in samples),
            draw=tuple(sample.draw for sample in samples),
            known_error=pin(self.errors.of(asked(samples))) if self.errors else None,
        )

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.backbone.device.type == "cuda" else tensor
