"""What a test's worker processes do; it imports little, for each of them imports it anew."""

import os
import signal
import time
from pathlib import Path

from diffpref.errors import UserError


def note(folder: Path, main: bool) -> str:
    """Note who did it; main waits for the other one."""
    (folder / str(os.getpid())).write_text(f"{main} {os.environ.get('DIFFPREF_WORKER')}")
    while main and len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    return "done"


def die(folder: Path, main: bool) -> str:
    note(folder, main)
    if not main:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def refuse(folder: Path, main: bool) -> str:
    if main:
        raise UserError("wrong")
    time.sleep(600)
    return ""


def note_and_wait(folder: Path, main: bool) -> str:
    (folder / str(os.getpid())).touch()
    time.sleep(600)
    return ""


def always_die(main: bool) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return ""
