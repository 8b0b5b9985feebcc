"""From a configuration to all that `diffpref plan` tells of it, as a record."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from diffpref.data.schema import read_dataset_file
from diffpref.errors import UserError
from diffpref.models import folder
from diffpref.models.loading import check_model
from diffpref.plan.architectures import local
from diffpref.plan.estimate import Memory, Planner, Work
from diffpref.plan.fitting import Fitter
from diffpref.plan.gpus import ASSUMED_MFU, GPUS, Gpu
from diffpref.train.config import Config

USUAL_PAIRS = 1000


@dataclass(frozen=True)
class Card:
    """A run on one GPU. fits: as configured. keys: what to change to fit; None where no change of ours is enough.

    peak: bytes on the GPU with these changes. pairs_per_second, days: of the run with these changes, at the assumed
    `mfu`.
    """

    gpu: Gpu
    fits: bool
    keys: dict[str, str] | None
    peak: int
    pairs_per_second: float
    days: float
    mfu: float


@dataclass(frozen=True)
class Plan:
    """All of a plan. items: pairs, or single images, that the store is planned for; `kind` names them."""

    config: Config
    notes: list[str]
    parameters: dict[str, int]
    memory: Memory
    building: int
    work: Work
    items: int
    kind: str
    disk: dict[str, int]
    cards: list[Card]


def make_plan(config: Config, card: Gpu | None = None, pairs: int | None = None) -> Plan:
    """The plan of a checked configuration, for one GPU or all that are known.

    Raises UserError for a model that is neither here nor known, and for settings that training would refuse.
    """
    config = _by_micro_batch(config)
    with _here(config) as (placed, notes):
        family = check_model(placed.model, trainable=True)

        fitter = Fitter(placed, Planner)
        asked = fitter.planner(0)
        net = asked.backbone.net
        texts = [part.encoder for part in asked.backbone.text_parts]
        items, found = _items(config, pairs)
        mfu = ASSUMED_MFU[family]
        return Plan(
            config=config,
            notes=notes + found,
            parameters={
                "network": sum(p.numel() for name, p in net.named_parameters() if ".lora_" not in name),
                "trained": sum(p.numel() for p in net.parameters() if p.requires_grad),
                "vae": sum(p.numel() for p in asked.backbone.vae.model.parameters()),
                "text_encoders": sum(p.numel() for text in texts for p in text.parameters()),
            },
            memory=asked.memory(),
            building=asked.building,
            work=asked.work,
            items=items,
            kind="pairs" if config.points.takes_pairs else "images",
            disk=asked.disk(items),
            cards=[_on(gpu, fitter, placed, mfu) for gpu in ([card] if card else GPUS.values())],
        )


def _on(gpu: Gpu, fitter: Fitter, config: Config, mfu: float) -> Card:
    fit = fitter.fit(gpu.memory)
    planner = fit.planner if fit else fitter.planner(0)
    items = config.train.batch_size * config.train.gradient_accumulation_steps
    seconds = planner.seconds(gpu, mfu)
    return Card(
        gpu=gpu,
        fits=fit is not None and not fit.keys,
        keys=fit.keys if fit else None,
        peak=fit.peak if fit else planner.memory().peak,
        pairs_per_second=items / seconds,
        days=config.train.max_steps * seconds / 86400,
        mfu=mfu,
    )


def _by_micro_batch(config: Config) -> Config:
    """The same run with its micro-batch as its batch size; `auto`, which only a GPU can tell, stays the batch size."""
    train = config.train
    if not isinstance(train.micro_batch, int):
        return config
    parts = train.batch_size * train.gradient_accumulation_steps // train.micro_batch
    split = replace(train, batch_size=train.micro_batch, gradient_accumulation_steps=parts, micro_batch=None)
    return replace(config, train=split)


@contextmanager
def _here(config: Config) -> Iterator[tuple[Config, list[str]]]:
    """The configuration with folders of config files for its hub ids, while it lasts, and without loading weights."""
    with tempfile.TemporaryDirectory() as scratch, folder.without_weights():
        model, notes = local(config.model, Path(scratch))
        yield replace(config, model=model), notes


def _items(config: Config, pairs: int | None) -> tuple[int, list[str]]:
    """How many items the store is planned for, and where the number comes from if nobody gave it."""
    if pairs is not None:
        if pairs < 1:
            raise UserError(f"--pairs: {pairs} is not a number above 0")
        return pairs, []
    path = Path(config.data.path)
    kept = (read_dataset_file(path) or {}).get("kept") if path.is_dir() else None
    if isinstance(kept, int) and kept > 0:
        return kept, []
    unknown = f"how many pairs {config.data.path} holds is not known here: disk for {USUAL_PAIRS:,}"
    return USUAL_PAIRS, [f"{unknown}; --pairs gives another number"]
