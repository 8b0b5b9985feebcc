"""Secrets stay out of what is said and written: keys in the environment, keys and passwords on the command line.

None of these is ever needed in a log, a run folder or an error; but they stand in addresses, in the words of servers,
and on command lines that are noted.
"""

import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from itertools import pairwise
from logging import LogRecord
from types import TracebackType

SHOWN = "***"
LEAST = 6  # characters: what is shorter is no key, and would be struck out of every other word
_KEYS = r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE)"
_VARIABLE = re.compile(rf"(^|_){_KEYS}(_?\d+)?$")  # HF_TOKEN, WANDB_API_KEY; not TOKENIZERS_PARALLELISM, HF_TOKEN_PATH
_OPTION = re.compile(rf"-(-|\S*[-_.]){_KEYS}$", re.IGNORECASE)  # --hub-token, --api_key; not --max-new-tokens
_ADDRESS = re.compile(r"(?<=://)[^/?#\s@]+(?=@)")  # who speaks, before the host
_FORMS = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bsk-[\w-]{16,}|(?<=Bearer )[^\s\"']{6,}")  # what keys look like


def redacted(text: str) -> str:
    """The text with *** for every secret in it that can be known."""
    for secret in sorted(set(_known(sys.argv)), key=len, reverse=True):
        text = text.replace(secret, SHOWN)
    return _FORMS.sub(SHOWN, _ADDRESS.sub(SHOWN, text))


def command(arguments: Sequence[str]) -> list[str]:
    """A command line that may be noted."""
    shown, hidden = [], False
    for argument in arguments:
        name, given, _ = argument.partition("=")
        if hidden:
            shown.append(SHOWN)
        else:
            shown.append(f"{name}={SHOWN}" if given and _OPTION.match(name) else redacted(argument))
        hidden = not hidden and not given and bool(_OPTION.match(argument))
    return shown


def log_filter(record: LogRecord) -> bool:
    """For a handler of logging: the record's message without secrets."""
    record.msg, record.args = redacted(record.getMessage()), ()
    return True


def show_traceback(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """For sys.excepthook: what Python shows, without secrets."""
    print(redacted("".join(traceback.format_exception(kind, error, at))), file=sys.stderr, end="")


def _known(arguments: Sequence[str]) -> Iterator[str]:
    """The values of the environment and of these arguments that are secrets."""
    named = {value for option, value in pairwise(arguments) if option == "--key-variable"}
    for name, value in os.environ.items():
        if (_VARIABLE.search(name.upper()) or name in named) and len(value) >= LEAST:
            yield value
    for place, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if not _OPTION.match(name):
            continue
        value = value if given else next(iter(arguments[place + 1 : place + 2]), "")
        if len(value) >= LEAST and not value.startswith("--"):
            yield value
