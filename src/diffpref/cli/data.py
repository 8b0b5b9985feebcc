"""`diffpref data COMMAND ...`: import, check, cache and make preference data."""

import importlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from diffpref.cli.parsing import parse
from diffpref.errors import UserError, nearest


@dataclass(frozen=True)
class CheckArguments:
    """Check a dataset in the normal form: columns, images, labels, duplicates, splits."""

    path: Positional[Path]
    """The dataset's folder."""
    max_bad_share: float = 0.05
    """Fail when more than this share of the rows has a problem."""
    json: bool = False
    """Print the findings as JSON, with every row's id."""


def run_check(arguments: list[str]) -> None:
    """`diffpref data check PATH`: the findings go to stdout; too many of them are a UserError."""
    given = parse(CheckArguments, arguments, "diffpref data check")
    from diffpref.data.check import check, refuse_bad, table

    _silence_pillow()
    report = check(given.path)
    print(json.dumps(report.as_dict(), indent=2) if given.json else table(report))
    refuse_bad(report, given.max_bad_share)


def _elsewhere(module: str, function: str) -> Callable[[list[str]], None]:
    """A command of another module, which is imported when it is called."""
    return lambda arguments: getattr(importlib.import_module(f"diffpref.cli.{module}"), function)(arguments)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "import": (_elsewhere("data_import", "main"), "a published dataset -> the normal form"),
    "check": (run_check, "validate a dataset in the normal form"),
    "cache": (_elsewhere("data_cache", "main"), "encode images and prompts once, for training"),
    "export": (_elsewhere("data_export", "main"), "a dataset in the form of another tool"),
    "caption": (_elsewhere("data_make", "run_caption"), "a caption for every image"),
    "label": (_elsewhere("data_make", "run_label"), "a scorer's scores for every image"),
    "select": (_elsewhere("data_make", "run_select"), "only the images with the highest scores"),
    "pairs": (_elsewhere("data_make", "run_pairs"), "expert images against a model's own"),
}


def usage() -> str:
    """The text of `diffpref data --help`."""
    rows = "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: diffpref data COMMAND [options]\n\n{rows}\n\n`diffpref data COMMAND --help` tells a command's options."
    )


def main(arguments: list[str]) -> None:
    """Run one of the `data` commands."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        if not arguments:
            raise UserError("data needs a command")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise UserError(f"unknown command 'data {name}': {nearest(name, COMMANDS)}")
    COMMANDS[name][0](rest)


def _silence_pillow() -> None:
    """Pillow warns of broken metadata in images that it reads well; a broken picture is an error, which we count."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
