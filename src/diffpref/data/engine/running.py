"""Answer a stage's questions: here, in worker processes, on ranks of torchrun, or on Ray; each unit once."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from diffpref.data.choice import MAX_BAD_SHARE
from diffpref.data.dataset import Pictures, PreferenceDataset
from diffpref.data.engine.ledger import Ledger
from diffpref.data.engine.plan import Plan, Question, plan_of
from diffpref.data.engine.stage import Stage, answer_unit
from diffpref.errors import UserError
from diffpref.progress import Bar

WAIT = 0.1  # seconds between looks at what other processes are busy with
LOOK = 2.0  # seconds between looks at what other processes have finished
WORKER = "DIFFPREF_WORKER"  # a worker process's number, for the choice of its device


@dataclass(frozen=True)
class Running:
    """How stages run. ledger: its folder, if not the usual.

    workers: processes on this machine, this one among them; on Ray, actors, each with `gpus` GPUs.
    """

    workers: int = 1
    engine: Literal["local", "ray"] = "local"
    ledger: Path | None = None
    gpus: float = 0


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
    stage: Stage, questions: Iterable[Question], dataset: PreferenceDataset, ledger: Path, running: Running
) -> Answers | None:
    """The answers to the questions; those that the ledger lacks are made. None on ranks above 0, when all is claimed.

    Raises UserError where the ledger cannot be written, the tool refuses to load, or too many images are broken.
    """
    plan, numbers = plan_of(questions, stage.unit)
    book = Ledger(ledger, stage)
    while True:
        if running.engine == "ray":
            from diffpref.data.engine.on_ray import answer_on_ray

            answer_on_ray(stage, plan, dataset.pictures, book, running)
        else:
            _answer(stage, plan, dataset.pictures, book, running)
        if not is_main():
            return None
        units = [book.read(name) for name, _ in plan.units()]
        found = [unit for unit in units if unit is not None]
        if len(found) == len(units):
            return Answers(numbers, found)
        print(f"diffpref: {len(units) - len(found)} damaged files of {book.folder} are made again", file=sys.stderr)


def missing_units(book: Ledger, plan: Plan) -> dict[str, pa.Table]:
    """The units that the ledger lacks, by name."""
    finished = book.finished()
    return {name: unit for name, unit in plan.units() if name not in finished}


def known_answers(book: Ledger, plan: Plan) -> dict[bytes, dict]:
    """Answers of other plans' units, by key: of a dataset that held some of the same images and prompts."""
    mine = {name for name, _ in plan.units()}
    known: dict[bytes, dict] = {}
    for name in book.finished() - mine:
        if (unit := book.read(name)) is not None:
            known |= {row["key"]: row for row in unit.to_pylist()}
    return known


def _answer(stage: Stage, plan: Plan, pictures: Pictures, book: Ledger, running: Running) -> None:
    """Answer what is missing, with helpers if there are to be any; the main process waits for what others claimed."""
    helpers: list[BaseProcess] = []
    spawn = multiprocessing.get_context("spawn")
    try:
        for number in range(1, min(running.workers, len(missing_units(book, plan)))):
            given = (stage, plan, pictures, book.root, number, os.getpid())
            helpers.append(spawn.Process(target=_help, args=given, daemon=True))
            helpers[-1].start()
        work(stage, plan, pictures, book, shown=is_main(), waits=is_main())
        for helper in helpers:
            helper.join()
            if helper.exitcode:
                print(f"diffpref: warning: a worker ended with code {helper.exitcode}", file=sys.stderr)
    finally:
        for helper in helpers:
            helper.terminate()


def _help(stage: Stage, plan: Plan, pictures: Pictures, ledger: Path, number: int, parent: int) -> None:
    """A worker process beside the main one; it ends when the main one is gone."""
    os.environ[WORKER] = str(number)
    try:
        work(stage, plan, pictures, Ledger(ledger, stage), shown=False, waits=False, parent=parent)
    except UserError:
        sys.exit(2)  # the main process meets the same fault, and tells of it


def work(
    stage: Stage,
    plan: Plan,
    pictures: Pictures,
    book: Ledger,
    shown: bool,
    waits: bool,
    parent: int | None = None,
) -> None:
    """Claim and answer units until none is left unclaimed; who `waits` stays until all are finished.

    Raises UserError as soon as so many images are broken that over 5% of the rows must be.
    """
    missing = missing_units(book, plan)
    left = sum(unit.num_rows for unit in missing.values())
    known = known_answers(book, plan) if missing else {}
    broken, looked, say = 0, time.monotonic(), None
    with Bar(stage.name, len(plan), "answers", done=len(plan) - left, shown=shown) as bar:
        while missing:
            before = len(missing)
            for name, unit in list(missing.items()):
                if parent is not None and os.getppid() != parent:
                    return
                with book.claims.claim(name) as mine:
                    if mine and not book.has(name):
                        say = say or stage.load()
                        answers = answer_unit(stage, unit, say, pictures, known)
                        book.write(name, answers)
                        broken += len(answers) - answers["broken"].null_count
                        refuse_broken(pictures, broken, unit, answers)
                    if mine and missing.pop(name, None) is not None:
                        bar.advance(unit.num_rows)
                if time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    _strike(book, missing, bar)
            if not waits:
                return
            _strike(book, missing, bar)
            if len(missing) == before:
                time.sleep(WAIT)


def _strike(book: Ledger, missing: dict[str, pa.Table], bar: Bar) -> None:
    """Strike off what other processes have finished."""
    for name in book.finished() & missing.keys():
        bar.advance(missing.pop(name).num_rows)


def refuse_broken(pictures: Pictures, broken: int, unit: pa.Table, answers: pa.Table | None) -> None:
    """Raise UserError where so many images are broken that over 5% of the rows must be; `unit` has one of them."""
    rows = sum(sum(shard.groups) for shard in pictures.shards)
    if answers is None or broken <= MAX_BAD_SHARE * rows * len(pictures.sides):
        return
    place, reason = next((place, why) for place, why in enumerate(answers["broken"].to_pylist()) if why)
    such = f"row {unit['row'][place].as_py()}: image_{reason} ({answers['why'][place].as_py()})"
    told = f"{broken} images so far cannot be decoded; such as {such}"
    raise UserError(f"over {MAX_BAD_SHARE:.0%} of {rows} rows are bad: {told}")
