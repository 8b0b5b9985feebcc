"""The one error for what a user got wrong, the nearest right name, and the errors of others in one line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong. Its message is one clear line; the command ends with exit code 2, no traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Text that helps with a wrong name: the nearest known one, or all of them when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, torch's on a GPU or a CPU, or that of a library below torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    signs = (" out of memory", "can't allocate memory", "not enough memory", "_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class RunError(Exception):
    """A run cannot go on, through no fault of the input. Its message is one line; the command ends with exit code 1."""


class LostProcessError(RunError):
    """Another process of the run is gone. The command ends without any farewell, which might wait for that one."""


class Stopped(BaseException):
    """A run was told to stop, and has stopped in order. Its message is one line; code: the command's exit code.

    Like KeyboardInterrupt it is no Exception, for what handles errors is not to handle it.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
