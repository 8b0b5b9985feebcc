"""Answer units: claim them, decode their images once for all tools that lack them, ask, and write what is said.

Images are read, decoded and prepared in threads, up to two batches ahead of the tools and over the ends of units. So a
network waits for images only where decoding as a whole is slower than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
from PIL import Image

from diffpref.data.engine.ledger import Ledger
from diffpref.data.engine.plan import Plan
from diffpref.data.engine.source import Images
from diffpref.data.engine.stage import Asked, Preparing, Refusal, Say, Stage
from diffpref.data.images import BadImage, decode
from diffpref.data.threads import ahead, groups, map_in_order
from diffpref.scorers.base import Prepare

AHEAD = 2  # batches


@dataclass
class Desk:
    """A stage at work in this process: its ledger, and its tool as soon as it has something to answer.

    known: answers of other plans' units, by key: of a dataset that held some of the same images and prompts.
    """

    stage: Stage
    book: Ledger
    known: dict[bytes, dict]
    tool: Say | None = None

    @property
    def say(self) -> Say:
        """The tool, loaded at the first call."""
        if self.tool is None:
            self.tool = self.stage.load()
        return self.tool

    @property
    def prepare(self) -> Prepare | None:
        """What is done to each image before the tool sees it, in the threads that decode."""
        tool = self.say
        return tool.prepare if isinstance(tool, Preparing) else None


@dataclass(frozen=True)
class Finished:
    """A unit that is written: its name, and how many answers it has, of all desks.

    broken: how many of its images cannot be decoded, as the table of one desk's answers tells.
    """

    name: str
    answers: int
    broken: int
    table: pa.Table | None


@dataclass
class _Job:
    """A claimed unit on its way: the desks that lack it, and what each of them has said so far, by key."""

    name: str
    unit: pa.Table
    desks: list[Desk]
    held: ExitStack
    found: list[dict[bytes, dict]] = field(default_factory=list)

    def write(self) -> Finished:
        """Put the answers into the ledgers."""
        keys, broken, of_broken = self.unit["key"].to_pylist(), 0, None
        for desk, found in zip(self.desks, self.found, strict=True):
            rows = [{**(found.get(key) or desk.known[key]), "key": key} for key in keys]
            table = pa.Table.from_pylist(rows, desk.stage.schema)
            desk.book.write(self.name, table)
            if (count := len(table) - table["broken"].null_count) > broken:
                broken, of_broken = count, table
        return Finished(self.name, len(self.desks) * len(keys), broken, of_broken)


@dataclass(frozen=True)
class _Shown:
    """A question with its image: decoded, if a desk wants it so, broken, or absent; and as each `prepare` made it."""

    row: dict[str, Any]
    image: Image.Image | BadImage | None
    prepared: dict[Prepare, Any]


def desks_of(stages: list[Stage], books: list[Ledger], plan: Plan) -> list[Desk]:
    """The desks of stages, with what their ledgers know from other plans."""
    mine = {name for name, _ in plan.units()}
    return [Desk(stage, book, _known(book, mine)) for stage, book in zip(stages, books, strict=True)]


def _known(book: Ledger, mine: set[str]) -> dict[bytes, dict]:
    known: dict[bytes, dict] = {}
    for name in book.finished() - mine:
        if (unit := book.read(name)) is not None:
            known |= {row["key"]: row for row in unit.to_pylist()}
    return known


def answered(
    desks: list[Desk], units: Mapping[str, pa.Table], pictures: Images, wanted: Callable[[], bool] = lambda: True
) -> Iterator[Finished]:
    """Go once through the units; what desks lack and nobody else has claimed is answered and written.

    wanted: asked before each unit whether to go on.
    """
    claimed: list[_Job] = []
    batch = max(desk.stage.batch for desk in desks)
    stream = ahead(_shown(desks, units, pictures, wanted, claimed, batch), AHEAD)
    try:
        for job, group in stream:
            if group:
                _ask(job, group)
            else:
                yield job.write()
                job.held.close()
    finally:
        stream.close()
        for job in claimed:
            job.held.close()


def _shown(
    desks: list[Desk],
    units: Mapping[str, pa.Table],
    pictures: Images,
    wanted: Callable[[], bool],
    claimed: list[_Job],
    batch: int,
) -> Iterator[tuple[_Job, list[_Shown]]]:
    """Batches of questions with their images, unit by unit; an empty batch ends a unit."""
    for name, unit in units.items():
        if not wanted():
            return
        job = _claim(desks, name, unit)
        if job is None:
            continue
        claimed.append(job)
        rows = unit.to_pylist()
        asked = [row for row in rows if any(row["key"] not in desk.known for desk in job.desks)]
        if asked:
            prepares = {desk.prepare for desk in job.desks}
            show = partial(_show, [each for each in prepares if each], None in prepares)
            shown = map_in_order(show, _with_images(asked, pictures))
            for group in groups(shown, batch):
                yield job, group
        yield job, []


def _claim(desks: list[Desk], name: str, unit: pa.Table) -> _Job | None:
    """The unit for the desks that lack it and hold it now; None where there are none."""
    held, mine = ExitStack(), []
    for desk in desks:
        if not desk.book.has(name) and held.enter_context(desk.book.claims.claim(name)) and not desk.book.has(name):
            mine.append(desk)
    if not mine:
        held.close()
        return None
    return _Job(name, unit, mine, held, [{} for _ in mine])


def _with_images(asked: list[dict], pictures: Images) -> Iterator[tuple[dict, bytes | None]]:
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


def _show(prepares: Iterable[Prepare], plain: bool, question: tuple[dict, bytes | None]) -> _Shown:
    """Decode an image and prepare it in each way; the image itself is kept if a desk wants it `plain`."""
    row, content = question
    if content is None:
        return _Shown(row, None, {})
    try:
        image = decode(content)
        return _Shown(row, image if plain else None, {prepare: prepare(image) for prepare in prepares})
    except BadImage as error:
        return _Shown(row, error, {})


def _ask(job: _Job, group: list[_Shown]) -> None:
    """Let every desk answer what it does not know of a group."""
    for desk, found in zip(job.desks, job.found, strict=True):
        new = [shown for shown in group if shown.row["key"] not in desk.known]
        for shown in new:
            if isinstance(shown.image, BadImage):
                found[shown.row["key"]] = {"broken": shown.image.reason, "why": str(shown.image)}
        good = [shown for shown in new if not isinstance(shown.image, BadImage)]
        for some in groups(good, desk.stage.batch):
            said = desk.say([_asked(shown, desk.prepare) for shown in some])
            for shown, value in zip(some, said, strict=True):
                key = shown.row["key"]
                found[key] = {"why": value.why} if isinstance(value, Refusal) else {"value": value}


def _asked(shown: _Shown, prepare: Prepare | None) -> Asked:
    image = shown.image if prepare is None and not isinstance(shown.image, BadImage) else None
    return Asked(shown.row["text"], image, shown.row["name"], shown.prepared.get(prepare) if prepare else None)
