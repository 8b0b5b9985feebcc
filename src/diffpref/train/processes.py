"""The other processes of a run: what it means when one of them is gone, and that none outlives what started it."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import torch
from accelerate.utils import InitProcessGroupKwargs

from diffpref.errors import LostProcessError, first_line

LOOK = 0.5  # seconds between looks at whether the launcher is there
GRACE = 120.0  # seconds that an orphan has to write its checkpoint


def waiting_at_most(seconds: float) -> InitProcessGroupKwargs:
    """For accelerate: how long processes wait for one another before they take the others for hung."""
    return InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))


def lost(error: Exception, seconds: float) -> LostProcessError | None:
    """The error of one line where it says that another process is gone or silent; else None.

    seconds: how long was waited for it.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2:
        return None
    of_network = isinstance(error, torch.distributed.DistError)
    if not of_network and not (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
        return None
    told = first_line(error).rpartition("] ")[2].partition(". ")[0]
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return LostProcessError(
        f"process {rank} of {count} ends, for another one has died, or was silent for {seconds:g} s "
        f"(train.process_timeout): {told}; see what the others said, then add --resume"
    )


def end_with_launcher() -> None:
    """If torchrun started this process, or accelerate through it, end when that is gone: by SIGTERM, then for good.

    A launcher that is killed can end nobody, and the processes would go on unseen.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)
