"""The same work on a Ray cluster, through Ray Data: actors that load the tool once and take units from the ledger.

All machines must see the dataset and the ledger under the same paths. An actor that dies is started again by Ray, and
what it had not finished is answered by another; finished units are files, so nothing of them is repeated. Work that is
shared by claims on a folder runs in tasks of Ray (`work_on_ray`).
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
    """Call `work(False)` in tasks of Ray, and `work(True)` in one of them; what that one says.

    Each task has a GPU where the cluster has any. One whose process dies is started again, LIVES times at most. These
    are plain tasks and not Ray Data's actors, which take their work from a stream of rows: here each worker has one
    call, and Ray Data (2.60) was seen to wait for ever for the call of an actor that had died.
    Raises UserError where Ray is not installed or the cluster is too small, and as `work` does; RunError where a task
    fails otherwise or dies for good.
    """
    with _ray(running.workers) as ray:
        has = ray.cluster_resources()
        running = replace(running, gpus=float(has.get("GPU", 0) > 0))
        _refuse_small(has, running)
        part = ray.remote(num_cpus=1, num_gpus=running.gpus, max_retries=LIVES)(_part)
        waiting = [part.remote(work, Path.cwd(), number == 0) for number in range(running.workers)]
        told = ""
        try:
            with Bar("Ray", running.workers, "workers") as bar:
                while waiting:
                    (ended,), waiting = ray.wait(waiting, num_returns=1)
                    said, error = ray.get(ended)
                    if error:
                        raise error
                    told = said or told
                    bar.advance()
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            again = "the same command does what is missing"
            raise RunError(f"--engine ray: a worker failed or died too often; {again} ({reason})") from error
        finally:
            for task in waiting:
                ray.cancel(task, force=True)
        return told


def _part(work: Callable[[bool], str], here: Path, main: bool) -> tuple[str, UserError | RunError | None]:
    """Do a worker's part of some work on some machine: what is said of it, or why it cannot be done."""
    with contextlib.suppress(OSError):  # where a machine lacks the folder, no path is below it
        os.chdir(here)
    try:
        return work(main), None
    except (UserError, RunError) as error:
        return "", error


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
    with _results_kept_apart():
        if begun:
            here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers + 1, "include_dashboard": False}
            ray.init(**here, log_to_driver=False, logging_level=logging.ERROR)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            yield ray
        finally:
            if begun:
                ray.shutdown()


@contextlib.contextmanager
def _results_kept_apart() -> Iterator[None]:
    """What is written to stdout goes to stderr: Ray tells of dead workers there, by threads and by processes."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _refuse_small(has: dict[str, float], running: Running) -> None:
    wanted = {"CPU": running.workers + 1, "GPU": running.workers * running.gpus}
    for kind, count in wanted.items():
        if has.get(kind, 0) < count:
            told = f"{running.workers} workers need {count:g} {kind}s (one CPU is for reading)"
            raise UserError(f"--engine ray: {told}, and the cluster has {has.get(kind, 0):g}")
