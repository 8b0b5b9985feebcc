"""The same work on a Ray cluster, through Ray Data: actors that load the tool once and take units from the ledger.

All machines must see the dataset and the ledger under the same paths. An actor that dies is started again by Ray, and
what it had not finished is answered by another; finished units are files, so nothing of them is repeated. Work that is
shared by claims on a folder runs in such actors too (`work_on_ray`).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffpref.data.engine.answering import Desk, Finished, answered, desks_of
from diffpref.data.engine.ledger import Ledger
from diffpref.data.engine.plan import Plan, name_of
from diffpref.data.engine.running import WAIT, Running, lacking, left_of, refuse_broken
from diffpref.data.engine.source import Images
from diffpref.data.engine.stage import Stage
from diffpref.errors import RunError, UserError
from diffpref.progress import Bar

BLOCKS = 1000  # most pieces that the units are handed out in
LIVES = 3  # how often an actor of `work_on_ray` is started again


def answer_on_ray(stages: list[Stage], plan: Plan, pictures: Images, books: list[Ledger], running: Running) -> None:
    """Answer what is missing by `running.workers` actors, on the cluster of RAY_ADDRESS or on a Ray of this machine.

    Raises UserError where Ray is not installed or the cluster is too small, and as `work` does.
    """
    units = dict(plan.units())
    missing = lacking(books, units)
    if not missing:
        return
    with _ray(running.workers) as ray:
        _refuse_small(ray.cluster_resources(), running)
        starts = [{"start": n * plan.unit} for n, name in enumerate(units) if name in missing]
        pieces = ray.data.from_items(starts, override_num_blocks=min(len(starts), BLOCKS))
        told = pieces.map_batches(
            _Actor,
            fn_constructor_args=(stages, ray.put(plan), pictures, books[0].root),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(running.workers, len(starts))),
            num_cpus=1,
            num_gpus=running.gpus,
        )
        broken, total = 0, len(plan) * len(books)
        title = f"{', '.join(stage.name for stage in stages)} on Ray"
        with Bar(title, total, "answers", done=total - left_of(missing, units)) as bar:
            for row in told.iter_rows():
                if row["error"]:
                    raise UserError(row["error"])
                bar.advance(row["answers"])
                broken += row["broken"]
                if row["broken"]:
                    table = next((found for book in books if (found := book.read(row["name"])) is not None), None)
                    done = Finished(row["name"], row["answers"], row["broken"], table)
                    refuse_broken(pictures, broken, units[row["name"]], done, running.bad_share)


def work_on_ray(work: Callable[[bool], str], running: Running) -> str:
    """Call `work(False)` in actors, and `work(True)` in one of them; what that one says.

    Each actor has a GPU where the cluster has any. One that dies is started again, LIVES times at most.
    Raises UserError where Ray is not installed or the cluster is too small, and as `work` does; RunError where an actor
    fails otherwise or dies for good.
    """
    with _ray(running.workers) as ray:
        has = ray.cluster_resources()
        running = replace(running, gpus=float(has.get("GPU", 0) > 0))
        _refuse_small(has, running)
        numbers = [{"number": number} for number in range(running.workers)]
        ended = ray.data.from_items(numbers, override_num_blocks=running.workers).map_batches(
            _Worker,
            fn_constructor_args=(work, Path.cwd()),
            batch_size=1,
            # each has one call alone: a second one would wait behind it instead of going to another actor
            compute=ray.data.ActorPoolStrategy(size=running.workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=running.gpus,
            max_restarts=LIVES,
            max_task_retries=LIVES,
        )
        told = ""
        try:
            with Bar("Ray", running.workers, "workers") as bar:
                for row in ended.iter_rows():
                    if row["error"]:
                        raise (UserError if row["wrong_input"] else RunError)(row["error"])
                    told = row["told"] or told  # a killed actor's part may be done twice
                    bar.advance()
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            again = "the same command does what is missing"
            raise RunError(f"--engine ray: a worker failed or died too often; {again} ({reason})") from error
        return told


class _Worker:
    """Does its part of some work on some machine."""

    def __init__(self, work: Callable[[bool], str], here: Path) -> None:
        self._work = work
        with contextlib.suppress(OSError):  # where a machine lacks the folder, no path is below it
            os.chdir(here)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """What is said of the work, by the first worker alone, or an error."""
        (number,) = batch["number"]
        told, error, wrong_input = "", "", False
        try:
            told = self._work(bool(number == 0))
        except (UserError, RunError) as fault:
            error, wrong_input = str(fault), isinstance(fault, UserError)
        return {"told": [told], "error": [error], "wrong_input": [wrong_input]}


class _Actor:
    """Answers units on some machine; the tool is loaded with the first of them."""

    def __init__(self, stages: list[Stage], plan: Any, pictures: Images, ledger: Path) -> None:
        self._pictures = pictures
        self._plan: Plan = importlib.import_module("ray").get(plan)
        self._desks: list[Desk] = desks_of(stages, [Ledger(ledger, stage) for stage in stages], self._plan)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """Of each unit, by where it starts, its name and how many answers and broken images it has, or an error."""
        rows = [self._unit(int(start)) for start in batch["start"]]
        return {key: [row[key] for row in rows] for key in rows[0]}

    def _unit(self, start: int) -> dict[str, Any]:
        unit = self._plan.table.slice(start, self._plan.unit)
        name, answers, broken, error = name_of(unit), 0, 0, ""
        try:
            while not all(desk.book.has(name) for desk in self._desks):
                for done in answered(self._desks, {name: unit}, self._pictures):
                    answers, broken = answers + done.answers, max(broken, done.broken)
                if not all(desk.book.has(name) for desk in self._desks):
                    time.sleep(WAIT)
        except UserError as fault:
            error = str(fault)
        return {"name": name, "answers": answers, "broken": broken, "error": error}


@contextlib.contextmanager
def _ray(workers: int) -> Iterator[Any]:
    """Ray, joined to the cluster of RAY_ADDRESS, or started here with a CPU more than actors: with none left for the
    reads between them, Ray Data waits for ever without a word. Raises UserError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers otherwise
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it logs errors where nothing is wrong
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError:
        raise UserError("--engine ray needs Ray, which is not installed: pip install 'diffpref[ray]'") from None
    begun = not ray.is_initialized()
    if begun:
        here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers + 1, "include_dashboard": False}
        ray.init(**here, log_to_driver=False, logging_level=logging.ERROR)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints of dead actors where results belong
            yield ray
    finally:
        if begun:
            ray.shutdown()


def _refuse_small(has: dict[str, float], running: Running) -> None:
    wanted = {"CPU": running.workers + 1, "GPU": running.workers * running.gpus}
    for kind, count in wanted.items():
        if has.get(kind, 0) < count:
            told = f"{running.workers} workers need {count:g} {kind}s (one CPU is for reading)"
            raise UserError(f"--engine ray: {told}, and the cluster has {has.get(kind, 0):g}")
