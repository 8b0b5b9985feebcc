"""What would have to change for a run to fit on a GPU, in the order of what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from diffpref.plan.estimate import Planner
from diffpref.train.config import Config

LORA_RANK = 16


@dataclass(frozen=True)
class Fit:
    """Settings that fit: the keys to change with their values as the command line takes them, and the peak in bytes."""

    peak: int
    planner: Planner
    keys: dict[str, str]


@dataclass(frozen=True)
class Variant:
    """A configuration that takes less memory, and the keys that make it."""

    config: Config
    keys: dict[str, str]


def variants(config: Config) -> Iterator[Variant]:
    """The configuration as it is, then with ever more costly changes.

    A smaller micro-batch changes nothing of the result and costs next to nothing, so it is tried within each of these.
    8-bit states cost a little exactness, checkpointing a quarter of the time, and LoRA is another training.
    """
    train, model = config.train, config.model
    # Adafactor's state is smaller still, and of adapters any is small
    eight = {"train.optimizer": "adamw8bit"} if train.optimizer == "adamw" and not model.lora_rank else {}
    again = {} if train.gradient_checkpointing else {"train.gradient_checkpointing": "true"}
    lora = {} if model.lora_rank else {"model.lora_rank": str(LORA_RANK)}
    seen: list[dict[str, str]] = []
    for keys in ({}, eight, again, eight | again, lora, lora | again):
        if keys not in seen:
            seen.append(keys)
            yield Variant(_changed(config, keys), keys)


def _changed(config: Config, keys: dict[str, str]) -> Config:
    train, model = config.train, config.model
    if "train.optimizer" in keys:
        train = replace(train, optimizer=keys["train.optimizer"])  # pyright: ignore[reportArgumentType]  one of its names
    if "train.gradient_checkpointing" in keys:
        train = replace(train, gradient_checkpointing=True)
    if "model.lora_rank" in keys:
        model = replace(model, lora_rank=LORA_RANK)
    return replace(config, model=model, train=train)


class Fitter:
    """Finds the least change for a card; variants are planned when they are first asked for, and once."""

    def __init__(self, config: Config, plan: Callable[[Config], Planner]) -> None:
        self._config, self._plan = config, plan
        self._variants = list(variants(config))
        self._planners: dict[int, Planner] = {}

    def planner(self, number: int) -> Planner:
        if number not in self._planners:
            self._planners[number] = self._plan(self._variants[number].config)
        return self._planners[number]

    def fit(self, memory: float) -> Fit | None:
        """The first settings whose peak is within so many GB; None where nothing of ours is."""
        train = self._config.train
        for number, variant in enumerate(self._variants):
            for batch in halved(train.batch_size):
                planner = self.planner(number)
                smaller = batch < train.batch_size
                peak = planner.memory(batch, accumulates=smaller or train.gradient_accumulation_steps > 1).peak
                if peak <= memory * 1e9:
                    keys = dict(variant.keys)
                    if smaller:
                        keys["train.batch_size"] = str(batch)
                        micros = train.gradient_accumulation_steps * train.batch_size // batch
                        keys["train.gradient_accumulation_steps"] = str(micros)
                    return Fit(peak, planner, keys)
        return None


def halved(batch: int) -> Iterator[int]:
    """The batch and its exact halves, down to an odd one: with more micro-steps they make the same effective batch."""
    yield batch
    while batch % 2 == 0:
        batch //= 2
        yield batch
