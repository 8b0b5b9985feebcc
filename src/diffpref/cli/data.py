"""`diffpref data COMMAND ...`: import, check, cache and make preference data."""

import importlib
from collections.abc import Callable

from diffpref.errors import UserError, nearest


def _elsewhere(module: str, function: str) -> Callable[[list[str]], None]:
    """A command of another module, which is imported when it is called."""
    return lambda arguments: getattr(importlib.import_module(f"diffpref.cli.{module}"), function)(arguments)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "import": (_elsewhere("data_import", "main"), "a published dataset -> the normal form"),
    "check": (_elsewhere("data_check", "main"), "looks at every row and image of a dataset"),
    "cache": (_elsewhere("data_cache", "main"), "encode images and prompts once, for training"),
    "export": (_elsewhere("data_export", "main"), "a dataset in the form of another tool"),
    "caption": (_elsewhere("data_text", "run_caption"), "a caption for every image"),
    "perturb": (_elsewhere("data_text", "run_perturb"), "a text that fits worse for the worse image"),
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
