"""The configuration that a command line names: a preset, then a file, then single keys."""

from pathlib import Path

from diffpref.cli.parsing import parse, take_value
from diffpref.errors import UserError
from diffpref.train.check import check
from diffpref.train.config import Config
from diffpref.train.config_file import from_yaml, with_kind


def configured(arguments: list[str], command: str) -> Config:
    """The resolved and checked configuration; raises UserError with one line for whatever is wrong in it."""
    from diffpref.presets import preset

    named = bool(arguments) and not arguments[0].startswith("-")
    chosen, rest = (preset(arguments[0]), arguments[1:]) if named else (Config(), arguments)
    file, rest = take_value(rest, "--config")
    if file is not None:
        chosen = from_yaml(Path(file), chosen)
    elif not named:
        raise UserError(f"{command} needs a preset or --config FILE; `diffpref {command} --help` lists the presets")
    for group in ("objective", "points"):
        name, rest = take_value(rest, f"--{group}.name")
        if name is not None:
            chosen = with_kind(chosen, group, name)
    return check(parse(Config, rest, f"diffpref {command} {arguments[0]}", chosen, switches=False))
