"""Read a command's arguments into a typed record with tyro, with errors of one line."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import tyro

from diffpref.errors import UserError

T = TypeVar("T")
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")
_BOX = re.compile(r"[╭╮╰╯│─]+|^[|]|[|]$|^[|+ ]*-{5,}[|+ ]*$")  # tyro's frames, and those it draws in ASCII


def parse(record: type[T], arguments: list[str], prog: str, default: T | None = None, switches: bool = True) -> T:
    """Fill `record` (a dataclass) from the arguments; `--help` prints and ends the program.

    Without `switches`, a bool is given as `--key true`, like any other value.
    Raises UserError with one line where an option is unknown or a value has the wrong type.
    """
    style = (tyro.conf.AvoidSubcommands, *(() if switches else (tyro.conf.FlagConversionOff,)))
    if not switches:
        arguments = [{"true": "True", "false": "False"}.get(argument, argument) for argument in arguments]
    given: dict[str, Any] = {} if default is None else {"default": default}
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), _terminal(wide=not {"-h", "--help"} & set(arguments)):
            return tyro.cli(record, args=arguments, prog=prog, config=style, **given)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UserError(_one_line(shown.getvalue(), prog)) from None


@contextlib.contextmanager
def _terminal(wide: bool) -> Iterator[None]:
    """Unless help is asked for, let tyro think that the terminal is wide: it breaks long names otherwise."""
    before = os.environ.get("COLUMNS")
    if wide:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if wide:
            del os.environ["COLUMNS"]
            if before is not None:
                os.environ["COLUMNS"] = before


def _one_line(box: str, prog: str) -> str:
    """The sentences of tyro's message without its frame, its title and its closing hints."""
    lines = [_BOX.sub("", line.strip()).strip() for line in box.splitlines()[1:]]
    text = " ".join(line for line in lines if line and not line.startswith("For full helptext"))
    text = re.sub(r"\s+", " ", text).partition(" Argument helptext: ")[0]
    return text.removesuffix(f" {prog} --help")


def take_flag(arguments: list[str], flag: str) -> tuple[bool, list[str]]:
    """Whether a flag is given, and the other arguments."""
    return flag in arguments, [argument for argument in arguments if argument != flag]


def take_value(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of `--option VALUE` or `--option=VALUE` (None if absent), and the other arguments."""
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.removeprefix(f"{option}="), arguments[:place] + arguments[place + 1 :]
        if argument == option:
            if place + 1 == len(arguments):
                raise UserError(f"{option} needs a value")
            return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
    return None, arguments


def seconds_of(text: str, option: str) -> int:
    """The seconds of a duration such as 3h30m, 2d, 90s or 5400. Raises UserError for anything else, and for none."""
    match = _DURATION.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    if not (total := ((days * 24 + hours) * 60 + minutes) * 60 + seconds):
        raise UserError(f"{option}: {text!r} is no time; write it as 3h30m, 45m, 2d, 90s or in seconds")
    return total


def take_count(arguments: list[str], option: str, usual: int) -> tuple[int, list[str]]:
    """The number of `--option`, `--option N` or `--option=N` (`usual` if none is named, 0 if absent), and the others.

    Raises UserError for what is no whole number above 0.
    """
    for place, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name != option:
            continue
        rest = arguments[place + 1 :]
        if not given and rest and not rest[0].startswith("-"):
            value, given, rest = rest[0], "=", rest[1:]
        if not given:
            return usual, arguments[:place] + rest
        if not value.isdecimal() or not int(value):
            raise UserError(f"{option}: {value!r} is not a whole number above 0")
        return int(value), arguments[:place] + rest
    return 0, arguments
