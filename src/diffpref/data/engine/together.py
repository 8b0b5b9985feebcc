"""Work that shares itself out by claims on a folder, as the store's and a folder of images': in several processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from diffpref.data.engine.running import WORKER, Running, is_main
from diffpref.errors import RunError, UserError

LOOK = 0.5  # seconds between a worker's looks at whether the main process is there


def together(work: Callable[[bool], str], running: Running) -> str:
    """Do the work in `running.workers` processes, here and beside this one, or in as many tasks on Ray.

    work: does what no other process is at; called with True, in one process of all, it stays until everything is done
    and says what is to be told. It is a function of a module or a `functools.partial` of one. A worker that dies is
    told of, and the others do its part. What is told; "" on ranks above 0.
    """
    if running.engine == "ray":
        from diffpref.data.engine.on_ray import work_on_ray

        return work_on_ray(work, running)
    spawn = multiprocessing.get_context("spawn")
    helpers: list[BaseProcess] = []
    try:
        for number in range(1, running.workers):
            helpers.append(spawn.Process(target=_help, args=(work, number, os.getpid()), daemon=True))
            helpers[-1].start()
        told = work(is_main())
        for helper in helpers:
            helper.join()
            if helper.exitcode:
                print(f"diffpref: warning: a worker ended with code {helper.exitcode}", file=sys.stderr)
        return told if is_main() else ""
    finally:
        for helper in helpers:
            helper.terminate()


def _help(work: Callable[[bool], str], number: int, parent: int) -> None:
    """A worker process beside the main one; it ends when the main one is gone."""
    os.environ[WORKER] = str(number)
    threading.Thread(target=_end_without, args=(parent,), daemon=True).start()
    logging.getLogger("diffpref").setLevel(logging.ERROR)  # what is to be said, the main process says
    try:
        work(False)
    except UserError:
        sys.exit(2)  # the main process meets the same fault, and tells of it
    except RunError:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_without(parent: int) -> None:
    """End this process, whatever it is at, when that parent is gone: files are whole, and claims end with it."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)
