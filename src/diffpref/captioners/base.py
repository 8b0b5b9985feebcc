"""What a captioner is, its options, and how one is found by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from diffpref import captioners, modules

if TYPE_CHECKING:
    from PIL import Image

TEMPLATE = (
    'This image was made for the text "{prompt}". Write a caption of one or two sentences that says what the image '
    "itself shows, whether or not it fits that text. Answer with the caption alone."
)
KIND = "captioner"
HOW_ALONE = ("device", "batch_size", "key_variable", "timeout", "tries")  # options that change no caption


@dataclass(frozen=True)
class CaptionOptions:
    """Every captioner's options; each takes some of them."""

    captioner: str = "embedded"
    """What looks at the images: `embedded` names what it can measure in pictures of the embedded world; `transformers`
    is any image-text-to-text model; `endpoint` is an OpenAI-compatible server."""
    model: str | None = None
    """transformers: a hub id or a folder. endpoint: the model's name there."""
    revision: str | None = None
    """transformers: the hub's branch, tag or commit."""
    url: str | None = None
    """endpoint: its address up to /v1."""
    key_variable: str | None = None
    """endpoint: the NAME of the environment variable that holds its key."""
    template: str = TEMPLATE
    """transformers, endpoint: what is asked of each image; {prompt} stands for its prompt."""
    max_new_tokens: int = 128
    """transformers, endpoint: the most tokens of a caption."""
    temperature: float = 0.0
    """transformers, endpoint: 0 takes the likeliest token each time."""
    top_p: float = 1.0
    """transformers, endpoint: draw from the likeliest tokens that have this share together."""
    seed: int = 0
    """transformers, endpoint: of the draws, where the temperature is above 0."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """transformers: of the weights."""
    device: str = "cpu"
    """transformers: where the model runs; `auto` spreads it over all GPUs."""
    batch_size: int = 8
    """transformers: images at once. endpoint: requests at once."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """endpoint: how it calls the limit of tokens."""
    timeout: float = 120.0
    """endpoint: seconds until a request counts as failed."""
    tries: int = 6
    """endpoint: how often a request is sent when the server is busy, broken or silent, with growing pauses."""


@dataclass(frozen=True)
class NoCaption:
    """Why an image has no caption."""

    reason: str


@runtime_checkable
class Captioner(Protocol):
    """Says what images show."""

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], draws: Sequence[int]
    ) -> Sequence[str | NoCaption]:
        """One caption for each image, which was made for its prompt, or why it has none.

        draws: a seed for each image, for captioners that draw.
        """
        ...


@runtime_checkable
class Looker(Protocol):
    """A captioner that can be shown several images at once, as a judge of two must be."""

    def look(
        self, shown: Sequence[Sequence[Image.Image]], prompts: Sequence[str], draws: Sequence[int]
    ) -> Sequence[str | NoCaption]:
        """One answer to the template for each row of images, or why there is none."""
        ...


def load_captioner(options: CaptionOptions) -> Captioner:
    """Load a captioner. Raises UserError as `identity`, and where it does not load."""
    module = modules.find(captioners, KIND, options.captioner)
    modules.check(module, KIND, options.captioner, options)
    return module.load(options)


def identity(options: CaptionOptions) -> dict[str, str | float]:
    """What the captions depend on besides images and prompts: the captioner, its version and its options.

    Raises UserError for an unknown captioner, and for an option that it does not take or that cannot be.
    """
    return modules.identity(captioners, KIND, options, HOW_ALONE)
