"""`diffpref data COMMAND ...`: import, check, cache and make preference data."""

import importlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from diffpref.cli.parsing import parse
from diffpref.errors import UserError, nearest


@dataclass(frozen=True)
class ImportArguments:
    """Import a published dataset into the normal form."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """The dataset's kind: pickapic, or dro for a folder of expert images."""
    input: Annotated[Positional[Path], arg(metavar="INPUT")]
    """Its file, or the folder of its files."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    split: str = "train"
    """The split to write, and the one to read where the input holds several."""
    ties: Literal["keep", "drop", "random"] = "keep"
    """Keep ties with label 0.5, drop them, or decide each by a coin that its id fixes."""
    max_bad_share: float = 0.05
    """Stop when more than this share of the rows is bad."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


def run_import(arguments: list[str]) -> None:
    """`diffpref data import SOURCE INPUT OUTPUT`: the counts go to stdout."""
    given = parse(ImportArguments, arguments, "diffpref data import")
    from diffpref.data.importing import ImportOptions, import_source

    _silence_pillow()
    options = ImportOptions(given.split, given.ties, given.max_bad_share, given.overwrite)
    summary = import_source(given.source, given.input, given.output, options)
    if given.json:
        from dataclasses import asdict

        print(json.dumps(asdict(summary), indent=2))
        return
    print(f"{given.output}: kept {summary.kept} of {summary.read} rows, {summary.ties} ties ({given.ties})")
    for reason, count in summary.dropped.items():
        print(f"  dropped {count:>8}  {reason}")


def _elsewhere(module: str, function: str) -> Callable[[list[str]], None]:
    """A command of another module, which is imported when it is called."""
    return lambda arguments: getattr(importlib.import_module(f"diffpref.cli.{module}"), function)(arguments)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "import": (run_import, "a published dataset -> the normal form"),
    "check": (_elsewhere("data_check", "main"), "looks at every row and image of a dataset"),
    "cache": (_elsewhere("data_cache", "main"), "encode images and prompts once, for training"),
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
