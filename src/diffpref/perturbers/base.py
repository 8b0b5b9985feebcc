"""What a perturber is, its options, and how one is found by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from diffpref import modules, perturbers

Level = Literal["weak", "medium", "strong"]
TEMPLATE = (
    "Rewrite this caption of an image so that it fits the image less: change {share} of its details, such as objects, "
    "colours, numbers, sizes or places, and keep its length and style. Answer with the new caption alone.\n\n{prompt}"
)
KIND = "perturber"
HOW_ALONE = ("device", "batch_size")  # options that change no text


@dataclass(frozen=True)
class PerturbOptions:
    """Every perturber's options; each takes some of them."""

    perturber: str = "rules"
    """What changes the texts: `rules` exchanges colours, counts, shapes, places and sizes by a list of words; `dipper`
    is the paraphraser of the paper; `transformers` is any text-to-text or chat model."""
    level: Level = "medium"
    """How much is changed. dipper: lexical diversity 40, 60 or 80. rules: one word, half of those that it knows, or all
    of them. transformers: what {share} stands for in the template."""
    model: str | None = None
    """dipper, transformers: a hub id or a folder; of dipper kalpeshk2011/dipper-paraphraser-xxl by default."""
    revision: str | None = None
    """dipper, transformers: the hub's branch, tag or commit."""
    tokenizer: str | None = None
    """dipper: its tokenizer's hub id or folder; by default the model folder's own, or google/t5-v1_1-xxl."""
    template: str = TEMPLATE
    """transformers: what the model is asked; {prompt} stands for the text, {share} for one, some or most by level."""
    max_new_tokens: int = 128
    """transformers: the most tokens of an answer."""
    temperature: float = 1.0
    """transformers: 0 takes the likeliest token each time."""
    top_p: float = 0.75
    """transformers: draw from the likeliest tokens that have this share together."""
    seed: int = 0
    """Of what is drawn, together with each row's id."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """dipper, transformers: of the weights."""
    device: str = "cpu"
    """dipper, transformers: where the model runs; `auto` spreads it over all GPUs."""
    batch_size: int = 8
    """dipper, transformers: texts at once."""


@runtime_checkable
class Perturber(Protocol):
    """Changes texts, so that they fit their images less."""

    def __call__(self, texts: Sequence[str], draws: Sequence[int]) -> list[str]:
        """Each text changed, as a function of the text and its draw (a seed) alone; as it was where nothing can be."""
        ...


def load_perturber(options: PerturbOptions) -> Perturber:
    """Load a perturber. Raises UserError as `identity`, and where it does not load."""
    module = modules.find(perturbers, KIND, options.perturber)
    modules.check(module, KIND, options.perturber, options)
    return module.load(options)


def identity(options: PerturbOptions) -> dict[str, str | float]:
    """What the texts depend on besides those that they were: the perturber, its version and its options.

    Raises UserError for an unknown perturber, and for an option that it does not take or that cannot be.
    """
    return modules.identity(perturbers, KIND, options, HOW_ALONE)
