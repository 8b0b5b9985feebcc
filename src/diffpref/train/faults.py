"""Faults of the machine, each in one line: memory, the disk, the other processes of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from diffpref.errors import RunError, UserError, out_of_memory
from diffpref.files import disk_full, no_room
from diffpref.train import memory, processes
from diffpref.train.config import Config


@contextlib.contextmanager
def told(config: Config) -> Iterator[None]:
    """Turn what goes wrong with the machine while a run lasts into RunError, whose message is one line."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        train = config.train
        if out_of_memory(error):
            at_once = train.micro_batch if isinstance(train.micro_batch, int) else train.batch_size
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            raise RunError(memory.ran_out(config, at_once, device, "outside a step")) from error
        if disk_full(error):
            line = f"{no_room(Path(config.output_dir))}; what was complete stays: make room, then add --resume"
            raise RunError(line) from error
        if (gone := processes.lost(error, train.process_timeout)) is not None:
            raise gone from error
        raise
