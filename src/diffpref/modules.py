"""Tools that are found by the name of their module: one file each in a package, and options that only some take.

A package of tools has `base.py` with a frozen dataclass of all its options; each other module says in `TAKES` which of
them it takes, tells in `version(options)` what else its results depend on, and makes its tool in `load(options)`.
"""

import importlib
import math
import pkgutil
from dataclasses import fields
from types import ModuleType
from typing import Any

from diffpref.errors import UserError, nearest

RANGES = {  # what numbers of these names may be, whichever tool takes them
    "batch_size": (1, math.inf),
    "max_new_tokens": (1, math.inf),
    "tries": (1, math.inf),
    "timeout": (0, math.inf),
    "temperature": (0, math.inf),
    "top_p": (0, 1),
}


def names(package: ModuleType) -> list[str]:
    """The command-line names of a package's tools: its modules' names with hyphens, without `base`."""
    modules = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name.replace("_", "-") for name in modules if name != "base")


def find(package: ModuleType, kind: str, name: str) -> ModuleType:
    """The module of a tool; `kind` is what such a tool is called. Raises UserError with the nearest right name."""
    if name not in names(package):
        raise UserError(f"unknown {kind} {name!r}: {nearest(name, names(package))}")
    return importlib.import_module(f"{package.__name__}.{name.replace('-', '_')}")


def check(module: ModuleType, kind: str, name: str, options: Any) -> None:
    """Raise UserError for an option that is given, other than its default, to a tool that does not take it, or wrong.

    options: the dataclass of the package's options; its field `kind` holds the tool's name.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in (kind, *module.TAKES) and value != field.default:
            takes = ", ".join(flag(each) for each in module.TAKES) or "none"
            raise UserError(f"{flag(field.name)}: the {kind} {name!r} has no such option; it takes: {takes}")
        least, most = RANGES.get(field.name, (-math.inf, math.inf))
        if field.name in RANGES and not least <= value <= most:  # so that nan is refused
            bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise UserError(f"{flag(field.name)} must be {bounds}, not {value}")


def flag(name: str) -> str:
    """An option as the command line spells it."""
    return "--" + name.replace("_", "-")


def identity(package: ModuleType, kind: str, options: Any, without: tuple[str, ...]) -> dict[str, str | float]:
    """What a tool's results depend on: its name, its version, and the options that it takes.

    Left out are options that are not set or in `without`. Raises UserError as `find`, `check` and the tool's `version`.
    """
    name = getattr(options, kind)
    module = find(package, kind, name)
    check(module, kind, name, options)
    taken = {each: getattr(options, each) for each in module.TAKES if each not in without}
    given = {each: value for each, value in taken.items() if value is not None}
    return {kind: name, "version": module.version(options), **given}
