"""A stage: a tool with its settings, and what it makes of one unit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import pyarrow as pa
from PIL import Image

from diffpref.data.dataset import Pictures
from diffpref.data.images import BadImage, decode
from diffpref.data.threads import groups, map_in_order

T = TypeVar("T")
VERSION = "1"  # raise it when the way from questions to answers changes


@dataclass(frozen=True)
class Asked:
    """A question as a tool sees it: `image` is None where it is of a text alone."""

    text: str
    image: Image.Image | None = None
    name: str = ""


@dataclass(frozen=True)
class Refusal:
    """A tool cannot answer a question, and why."""

    why: str


Said = float | str | Refusal | None
Say = Callable[[list[Asked]], list[Any]]


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


def answer_unit(stage: Stage, unit: pa.Table, say: Say, pictures: Pictures, known: dict[bytes, dict]) -> pa.Table:
    """The answers to a unit's questions (rows of a plan), in their order, as a table of `stage.schema`.

    known: answers that are there already, by key; their questions are not asked again.
    """
    asked = [row for row in unit.to_pylist() if row["key"] not in known]
    found: dict[bytes, dict] = {}
    shown = map_in_order(_decoded, _with_images(asked, pictures))
    for group in groups(shown, stage.batch):
        good = [(row, image) for row, image in group if not isinstance(image, BadImage)]
        for row, image in group:
            if isinstance(image, BadImage):
                found[row["key"]] = {"broken": image.reason, "why": str(image)}
        said = say([Asked(row["text"], image, row["name"]) for row, image in good]) if good else []
        for (row, _), value in zip(good, said, strict=True):
            found[row["key"]] = {"why": value.why} if isinstance(value, Refusal) else {"value": value}
    rows = [{**(found.get(key) or known[key]), "key": key} for key in unit["key"].to_pylist()]
    return pa.Table.from_pylist(rows, stage.schema)


def _with_images(asked: list[dict], pictures: Pictures) -> Iterator[tuple[dict, bytes | None]]:
    """Each question with its image's bytes; those without an image first, then in the order of the files."""
    places: dict[tuple[int, str], dict] = {}
    for row in asked:
        if row["image"]:
            places[row["row"], row["side"]] = row
        else:
            yield row, None
    for number, side, content in pictures.iter_images({number for number, _ in places}) if places else ():
        if row := places.get((number, side)):
            yield row, content


def _decoded(question: tuple[dict, bytes | None]) -> tuple[dict, Image.Image | BadImage | None]:
    row, content = question
    try:
        return row, None if content is None else decode(content)
    except BadImage as error:
        return row, error
