"""The reference cache: the reference's errors at every draw of a run, computed before it where they are not kept.

Each item has K draws (`train.reference_cache`), functions of the item and of a number below K alone, which its visits
take in turn, in an order of their own for each seed. So after K epochs the reference has nothing new to say, and all
that objectives take of it is one number a row, its error. These numbers are made here, in one pass without gradients
through what the run will meet and the store lacks, by all processes together. Afterwards the run needs no reference in
memory: in full fine-tuning the network that trains is the reference before its first step, and no copy is made.

The recipe of the errors is all that they depend on besides the row and its draw: the network's weights as they stand
in memory (so whatever was fused into them) with their dtype and its config, the schedule and what is predicted, the
kind of points, and the precision. Min-SNR weights, the objective, beta, learning rate and seed are no part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from xxhash import xxh3_128

from diffpref.data.building import Claims, share
from diffpref.data.loader import Loader, asked
from diffpref.data.reference_errors import KIND, ReferenceErrors
from diffpref.data.shard import TensorWriter
from diffpref.data.shards import Shards
from diffpref.data.store import Store
from diffpref.errors import RunError, UserError
from diffpref.points import Independent, Paired
from diffpref.progress import Bar
from diffpref.reference import adapters_off
from diffpref.train.config import Config
from diffpref.train.preferences import store_path
from diffpref.train.validation import looked_at
from diffpref.types import Backbone

log = logging.getLogger("diffpref")
VERSION = "1"  # raise it when the way from a draw to an error changes
BLOCK = 512  # places that are claimed and made together


def with_reference_errors(
    config: Config, backbone: Backbone, accelerator: Accelerator, loader: Loader, heldout: Loader | None
) -> tuple[Loader, Loader | None]:
    """The loaders with K draws an item and with the reference's errors in their batches.

    backbone: the policy before its first step and before it is wrapped; it, or what its adapters stand on, is the
    reference. All processes make what is missing together. Raises RunError for an error that is not finite, UserError
    where the store cannot be written.
    """
    folder, store = store_path(config), loader.store
    if not isinstance(store, Store):
        raise ValueError("errors are kept beside a latent store, and there is none")
    errors = ReferenceErrors(store, Shards(folder, KIND, recipe(config, backbone)))
    for file in errors.shards.damaged:
        log.warning("%s is damaged; what it lacks is made again", file)
    drawn = dataclasses.replace(loader, draws=config.train.reference_cache)
    parts = [(drawn, _places(config, drawn))]
    if heldout is not None:
        parts.append(looked_at(heldout, config.validation))
    writer = TensorWriter(folder, KIND, errors.shards.recipe)
    try:
        _Pass(config, backbone, accelerator, errors, writer).fill(parts)
    except OSError as error:
        raise UserError(f"data.cache: cannot write {folder}: {error.strerror}") from error
    accelerator.wait_for_everyone()
    errors.shards.refresh()
    ready = dataclasses.replace(drawn, errors=errors)
    return ready, None if heldout is None else dataclasses.replace(heldout, errors=errors)


def recipe(config: Config, backbone: Backbone) -> str:
    """A short hash of all that the errors depend on besides rows and draws."""
    told = {
        "version": VERSION,
        "network": fingerprint(backbone.net),
        "schedule": _told(backbone.schedule),
        "points": _told(config.points),
        "precision": config.train.mixed_precision,
        "model": [config.model.variant, config.model.guidance_embedding, config.model.max_text_length],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(net: torch.nn.Module) -> str:
    """A hash of a network's config and of its weights and their dtypes, without any adapters on it.

    Read from memory, at some gigabytes a second: a file's hash would not know of what was fused into the weights.
    """
    config: Any = net.config
    known = {name: value for name, value in dict(config).items() if not name.startswith("_")}
    digest = xxh3_128(f"{type(net).__name__} {json.dumps(known, sort_keys=True, default=str)}".encode())
    for name, value in net.state_dict().items():
        if ".lora_" in name:
            continue
        digest.update(f"{name.replace('.base_layer', '')} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value).data)
    return digest.hexdigest()


def _bytes(value: Tensor) -> np.ndarray:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _told(record: Any) -> dict[str, str]:
    """A frozen record's name and fields, tensors by their bytes."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    named = {name: _bytes(v).tobytes().hex() if isinstance(v, Tensor) else repr(v) for name, v in values.items()}
    return {"kind": type(record).__name__, **named}


def _places(config: Config, loader: Loader) -> range:
    """The places that show all that the run meets: its own, or those of K epochs if these are fewer.

    With buckets, an epoch may leave a few items to the next one.
    """
    epochs = loader.draws + (1 if len(loader.store.buckets.sizes) > 1 else 0)
    return range(min(config.train.max_steps * loader.run, epochs * len(loader)))


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One pass of the reference through what is missing."""

    config: Config
    backbone: Backbone
    accelerator: Accelerator
    errors: ReferenceErrors
    writer: TensorWriter

    def fill(self, parts: list[tuple[Loader, range]]) -> None:
        """Make the errors that are missing at the places of some loaders, together with other processes."""
        units = [(loader, places[at : at + BLOCK]) for loader, places in parts for at in range(0, len(places), BLOCK)]
        shards, made = self.errors.shards, 0

        def save() -> None:
            self.writer.close()
            shards.refresh()

        shown = bool(self.accelerator.is_main_process)
        with Bar("reference errors", sum(len(places) for _, places in units), "draws", shown=shown) as bar:

            def make(number: int) -> None:
                nonlocal made
                shards.refresh()
                loader, places = units[number]
                lacking = self._lacking(loader, places)
                bar.advance(len(places) - len(lacking))
                for some in loader.batches(lacking, self.config.train.batch_size):
                    self._make(loader, some)
                    made += len(some)
                    bar.advance(len(some))
                    if self.writer.due:
                        save()

            names = [f"{KIND} {shards.recipe} {loader.seed} {loader.draws} {places}" for loader, places in units]
            share(names, Claims(store_path(self.config)), make, lambda: self.writer.due, save)
        log.info("reference errors: %d draws computed here, %d rows kept in all", made, len(shards))

    def _lacking(self, loader: Loader, places: range) -> list[int]:
        """Those of these places an error of which is not kept."""
        samples = loader.samples(places)
        missing = self.errors.missing(asked(samples)).reshape(-1, len(samples))
        return [places[int(number)] for number in np.flatnonzero(missing.any(axis=0))]

    def _make(self, loader: Loader, places: list[int]) -> None:
        """Make the errors of at most a batch of places.

        Batches are always full, of repeats if need be: in one of another size the last bits could differ, and then an
        error would depend on what else was missing.
        """
        size, samples = self.config.train.batch_size, loader.samples(places)
        errors = self._errors(loader, places + places[-1:] * (size - len(places)))
        kept = errors.reshape(-1, size)[:, : len(places)]
        if not kept.isfinite().all():
            name = samples[int((~kept.isfinite()).any(dim=0).nonzero()[0])].name
            raise RunError(f"the reference's error on {name} is not finite, so it cannot be kept")
        self.errors.add(self.writer, asked(samples), kept.reshape(-1))

    @torch.no_grad()
    def _errors(self, loader: Loader, places: list[int]) -> Tensor:
        """The errors of a batch, (rows,) fp32, under the precision of training."""
        points, batch = self.config.points, loader.batch(places)
        if not isinstance(points, Paired | Independent):
            raise ValueError(f"{points.name!r} points are not functions of the batch alone")
        predict = adapters_off(self.backbone) if self.config.model.lora_rank else self.backbone.predict
        at = points(batch, self.backbone.schedule)
        with self.accelerator.autocast():
            predicted = predict(at.x_t, at.t, at.cond)
        return (predicted.float() - at.target.float()).square().flatten(1).mean(dim=1)
