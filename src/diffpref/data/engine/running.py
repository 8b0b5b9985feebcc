"""Answer a stage's questions: here, in worker processes, on ranks of torchrun, or on Ray; each unit once."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from diffpref.data.choice import MAX_BAD_SHARE
from diffpref.data.engine.answering import Desk, Finished, answered, desks_of
from diffpref.data.engine.ledger import Ledger
from diffpref.data.engine.plan import Plan, Question, plan_of
from diffpref.data.engine.source import Captioned, Images
from diffpref.data.engine.stage import Stage
from diffpref.errors import UserError
from diffpref.progress import Bar

WAIT = 0.1  # seconds between looks at what other processes are busy with
LOOK = 2.0  # seconds between looks at what other processes have finished
WORKER = "DIFFPREF_WORKER"  # a worker process's number, for the choice of its device


@dataclass(frozen=True)
class Running:
    """How stages run. ledger: its folder, if not the usual.

    workers: processes on this machine, this one among them; on Ray, actors or tasks, each with `gpus` GPUs.
    bad_share: of all rows so many may have broken images; more stop the work. shown: whether progress is.
    """

    workers: int = 1
    engine: Literal["local", "ray"] = "local"
    ledger: Path | None = None
    gpus: float = 0
    bad_share: float = MAX_BAD_SHARE
    shown: bool = True


@dataclass(frozen=True)
class Answer:
    """What is said of a question. Where nothing is: `broken` is the reason why its image cannot be decoded, if that is
    so, and `why` what is wrong in words."""

    value: float | str | None
    broken: str | None = None
    why: str | None = None


class Answers:
    """The answers to a list of questions, by their places in it."""

    def __init__(self, numbers: np.ndarray, units: list[pa.Table]) -> None:
        self._numbers = numbers
        self._values = [value for unit in units for value in unit["value"].to_pylist()]
        self._faults: dict[int, tuple[str | None, str | None]] = {}
        first = 0
        for unit in units:
            for place, fault in enumerate(zip(unit["broken"].to_pylist(), unit["why"].to_pylist(), strict=True), first):
                if fault != (None, None):
                    self._faults[place] = fault
            first += unit.num_rows

    def __len__(self) -> int:
        """The number of questions."""
        return len(self._numbers)

    def __getitem__(self, place: int) -> Answer:
        """The answer to the question at a place."""
        number = int(self._numbers[place])
        return Answer(self._values[number], *self._faults.get(number, (None, None)))


def rank() -> int:
    """This process's number among those that torchrun or accelerate started; 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def own_device(device: str) -> str:
    """The device of this worker or rank, where "cuda" alone is asked for."""
    number = os.environ.get("LOCAL_RANK", os.environ.get(WORKER))
    if device != "cuda" or number is None:
        return device
    import torch

    return f"cuda:{int(number) % max(torch.cuda.device_count(), 1)}"


def is_main() -> bool:
    """Whether this process writes results: the only one, or rank 0."""
    return rank() == 0


def ask(
    stage: Stage, questions: Iterable[Question], dataset: Captioned, ledger: Path, running: Running
) -> Answers | None:
    """The answers to the questions; those that the ledger lacks are made. None on ranks above 0, when all is claimed.

    Raises UserError where the ledger cannot be written, the tool refuses to load, or too many images are broken.
    """
    answers = ask_all([stage], questions, dataset, ledger, running)
    return answers[0] if answers else None


def ask_all(
    stages: Sequence[Stage], questions: Iterable[Question], dataset: Captioned, ledger: Path, running: Running
) -> list[Answers] | None:
    """The answers of several stages with units of one length, in one pass: each image is decoded once for all of them.

    What one of them lacks is asked of that one alone. Otherwise as `ask`.
    """
    plan, numbers = plan_of(questions, stages[0].unit)
    books = [Ledger(ledger, stage) for stage in stages]
    while True:
        if running.engine == "ray":
            from diffpref.data.engine.on_ray import answer_on_ray

            answer_on_ray(list(stages), plan, dataset.pictures, books, running)
        else:
            _answer(list(stages), plan, dataset.pictures, books, running)
        if not is_main():
            return None
        units = [[book.read(name) for name, _ in plan.units()] for book in books]
        found = [[unit for unit in each if unit is not None] for each in units]
        damaged = sum(map(len, units)) - sum(map(len, found))
        if not damaged:
            return [Answers(numbers, each) for each in found]
        print(f"diffpref: {damaged} damaged files of {ledger} are made again", file=sys.stderr)


def lacking(books: Sequence[Ledger], units: Iterable[str]) -> dict[str, int]:
    """How many ledgers lack a unit, by its name, where any does."""
    finished = [book.finished() for book in books]
    counts = {name: sum(name not in names for names in finished) for name in units}
    return {name: count for name, count in counts.items() if count}


def left_of(missing: dict[str, int], units: dict[str, pa.Table]) -> int:
    """The number of answers that are missing."""
    return sum(count * units[name].num_rows for name, count in missing.items())


def _answer(stages: list[Stage], plan: Plan, pictures: Images, books: list[Ledger], running: Running) -> None:
    """Answer what is missing, with helpers if there are to be any; the main process waits for what others claimed."""
    helpers: list[BaseProcess] = []
    spawn = multiprocessing.get_context("spawn")
    try:
        for number in range(1, min(running.workers, len(lacking(books, dict(plan.units()))))):
            given = (stages, plan, pictures, books[0].root, running, number, os.getpid())
            helpers.append(spawn.Process(target=_help, args=given, daemon=True))
            helpers[-1].start()
        work(stages, plan, pictures, books, running, shown=is_main() and running.shown, waits=is_main())
        for helper in helpers:
            helper.join()
            if helper.exitcode:
                print(f"diffpref: warning: a worker ended with code {helper.exitcode}", file=sys.stderr)
    finally:
        for helper in helpers:
            helper.terminate()


def _help(
    stages: list[Stage], plan: Plan, pictures: Images, ledger: Path, running: Running, number: int, parent: int
) -> None:
    """A worker process beside the main one; it ends when the main one is gone."""
    os.environ[WORKER] = str(number)
    try:
        books = [Ledger(ledger, stage) for stage in stages]
        work(stages, plan, pictures, books, running, shown=False, waits=False, parent=parent)
    except UserError:
        sys.exit(2)  # the main process meets the same fault, and tells of it


def work(
    stages: list[Stage],
    plan: Plan,
    pictures: Images,
    books: list[Ledger],
    running: Running,
    shown: bool,
    waits: bool,
    parent: int | None = None,
) -> None:
    """Claim and answer units until none is left unclaimed; who `waits` stays until all are finished.

    Raises UserError as soon as so many images are broken that more than `bad_share` of the rows must be.
    """
    units = dict(plan.units())
    missing = lacking(books, units)
    desks: list[Desk] = desks_of(stages, books, plan) if missing else []
    broken, looked, left = 0, time.monotonic(), left_of(missing, units)
    alive = partial(_is_child_of, parent)
    total, title = len(plan) * len(books), ", ".join(stage.name for stage in stages)
    with Bar(title, total, "answers", done=total - left, shown=shown) as bar:
        while missing:
            before = left
            for done in answered(desks, {name: units[name] for name in missing}, pictures, alive):
                broken += done.broken
                refuse_broken(pictures, broken, units[done.name], done, running.bad_share)
                missing.pop(done.name, None)
                if time.monotonic() - looked > LOOK:  # what other processes have finished is struck off
                    looked, missing = time.monotonic(), lacking(books, units)
                bar.advance(left - left_of(missing, units))
                left = left_of(missing, units)
            if not (waits and alive()):
                return
            missing = lacking(books, units)
            bar.advance(left - left_of(missing, units))
            left = left_of(missing, units)
            if missing and left == before:
                time.sleep(WAIT)


def _is_child_of(parent: int | None) -> bool:
    """Whether this process has that parent still; always where it is to have none."""
    return parent is None or os.getppid() == parent


def refuse_broken(pictures: Images, broken: int, unit: pa.Table, done: Finished, bad_share: float) -> None:
    """Raise UserError where so many images are broken that more than `bad_share` of the rows must be.

    unit, done: the questions of a unit with one of them, and what was said.
    """
    if done.table is None or not done.broken or broken <= bad_share * len(pictures) * len(pictures.sides):
        return
    place, reason = next(((n, why) for n, why in enumerate(done.table["broken"].to_pylist()) if why), (0, "unreadable"))
    where = pictures.where(unit["row"][place].as_py(), unit["side"][place].as_py())
    told = f"{broken} images so far cannot be decoded; such as {where}: image_{reason}"
    raise UserError(
        f"over {bad_share:.0%} of {len(pictures)} rows are bad: {told} ({done.table['why'][place].as_py()})"
    )
