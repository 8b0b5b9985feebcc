"""From a dataset and its store to batches. The sample at a place is arithmetic: nothing here keeps state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from diffpref.data.dataset import PairDataset
from diffpref.data.store import Store
from diffpref.draws import draw_seed, permutation, uniform
from diffpref.errors import UserError
from diffpref.train.config import DataConfig
from diffpref.types import Backbone, Batch


@dataclass(frozen=True)
class Choice:
    """Which rows are trained on and which are held out, and how many were left out, by reason."""

    train: list[int]
    heldout: list[int]
    dropped: dict[str, int]


def choose_rows(dataset: PairDataset, store: Store, data: DataConfig) -> Choice:
    """Split by prompt (`data.holdout`), leave out broken rows and, if so configured, ties.

    A prompt is held out when the number that its text hashes to lies below the share, so it stands on one side only,
    and adding rows moves no prompt. Raises UserError where nothing is left to train on.
    """
    train, heldout, dropped = [], [], {"unreadable": 0, "ties": 0}
    for row in range(len(dataset)):
        if store.hashes[row] is None:
            dropped["unreadable"] += 1
        elif data.ties == "drop" and dataset.labels[row] == 0.5:
            dropped["ties"] += 1
        elif uniform(draw_seed(dataset.prompts[row]), "holdout") < data.holdout:
            heldout.append(row)
        else:
            train.append(row)
    if dropped["ties"] == len(dataset):
        raise UserError(f"all {len(dataset)} pairs are ties; train on them with --data.ties soft or random")
    if not train:
        why = ", ".join(f"{count} {reason}" for reason, count in {**dropped, "held out": len(heldout)}.items())
        raise UserError(f"no pair of {len(dataset)} is left to train on: {why}")
    return Choice(train, heldout, dropped)


@dataclass(frozen=True)
class Loader:
    """Batches of chosen rows of a dataset, in an order that the seed fixes.

    pairs: two rows an item (chosen, rejected), or the chosen image alone.
    """

    dataset: PairDataset
    store: Store
    backbone: Backbone
    data: DataConfig
    rows: list[int]
    seed: int
    pairs: bool

    def batch(self, places: list[int]) -> Batch:
        """The samples at these places; place p is number p mod n of epoch p // n, with n rows."""
        return self._collate([self._sample(place) for place in places])

    def _sample(self, place: int) -> tuple[int, int]:
        epoch, k = divmod(place, len(self.rows))
        return self.rows[_order(self.seed, epoch, len(self.rows))[k]], draw_seed(self.seed, "sample", epoch, k)

    def _collate(self, samples: list[tuple[int, int]]) -> Batch:
        chosen, rejected, labels = [], [], []
        for row, draw in samples:
            mirrored = self.data.flip and uniform(draw, "flip") < 0.5
            dropped = uniform(draw, "prompt") < self.data.prompt_dropout
            better, worse = self.store.hashes[row] or ("", "")
            sides = [
                ((better, mirrored), "" if dropped else self.dataset.chosen_prompts[row]),
                ((worse, mirrored), "" if dropped else self.dataset.rejected_prompts[row]),
            ]
            label = self.dataset.labels[row]
            if label == 0.5 and self.data.ties == "random":
                label = float(uniform(draw_seed(self.seed, self.dataset.ids[row]), "tie") < 0.5)
            if label < 0.5:  # the rejected one is the likelier winner: it takes the first half
                sides, label = sides[::-1], 1 - label
            chosen.append(sides[0])
            rejected.append(sides[1])
            labels.append(label)
        rows = chosen + rejected if self.pairs else chosen
        device = self.backbone.device
        latents = self.store.images([key for key, _ in rows]).to(device)
        cond = self.store.prompts([prompt for _, prompt in rows])
        weights = [self.dataset.weights[row] for row, _ in samples]
        return Batch(
            latents=self.backbone.scale_latents(latents),
            cond={name: part.to(device) for name, part in cond.items()},
            label=torch.tensor(labels, dtype=torch.float32, device=device),
            weight=torch.tensor(weights, dtype=torch.float32, device=device),
            id=tuple(self.dataset.ids[row] for row, _ in samples),
            draw=tuple(draw for _, draw in samples),
        )


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return permutation(seed, epoch, count)
