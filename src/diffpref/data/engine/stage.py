"""A stage: a tool with its settings, and how it is asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import pyarrow as pa
from PIL import Image

from diffpref.scorers.base import Prepare

T = TypeVar("T")
VERSION = "1"  # raise it when the way from questions to answers changes


@dataclass(frozen=True)
class Asked:
    """A question as a tool sees it: `image` is None where it is of a text alone.

    prepared: for a tool that is `Preparing`, what it made of the image, and no image.
    """

    text: str
    image: Image.Image | None = None
    name: str = ""
    prepared: Any = None


@dataclass(frozen=True)
class Refusal:
    """A tool cannot answer a question, and why."""

    why: str


Said = float | str | Refusal | None
Say = Callable[[list[Asked]], list[Any]]


@runtime_checkable
class Preparing(Protocol):
    """A `Say` that sees what `prepare` makes of each image, in the threads that decode; equal ones are called once."""

    @property
    def prepare(self) -> Prepare: ...

    def __call__(self, asked: list[Asked]) -> list[Any]: ...


@dataclass(frozen=True)
class Stage:
    """A tool with its settings. `name` and `identity` tell what the answers depend on besides the questions.

    identity: the tool's name, its version or the hash of its weights, and the settings that change its answers; not
    the device, and not the batch.
    load: gives what answers a list of questions; picklable, and called once in each process that works.
    batch: questions that the tool sees at once. unit: questions whose answers are written together, or lost by a kill.
    """

    name: str
    identity: dict[str, str | float]
    load: Callable[[], Say]
    answers: Literal["number", "text"]
    batch: int = 32
    unit: int = 128

    @property
    def key(self) -> str:
        """Twelve digits that name the stage: a hash of all that its answers depend on."""
        told = json.dumps([VERSION, self.name, self.answers, self.identity], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    @property
    def schema(self) -> pa.Schema:
        """The columns of a unit's file: of each question its key, what is said, and why nothing is.

        broken: the reason why its image cannot be decoded. why: that in words, or the tool's own refusal.
        """
        value = pa.float64() if self.answers == "number" else pa.string()
        text = pa.string()
        return pa.schema([("key", pa.binary(16)), ("value", value), ("broken", text), ("why", text)])


class Once(Generic[T]):
    """What is loaded once in each process, when it is first asked for; pickled, it is only the way to load it."""

    def __init__(self, load: Callable[[], T]) -> None:
        self._load = load
        self._loaded: list[T] = []

    def __call__(self) -> T:
        """The loaded thing."""
        if not self._loaded:
            self._loaded.append(self._load())
        return self._loaded[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return Once, (self._load,)
