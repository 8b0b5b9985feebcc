"""`diffpref train [PRESET] [--config FILE] [--dotted.key VALUE] [--resume] [--profile] [--print-config]`."""

import os
from pathlib import Path

from diffpref.cli.parsing import parse, take_count, take_flag, take_value
from diffpref.errors import UserError
from diffpref.train.check import check
from diffpref.train.config import Config
from diffpref.train.config_file import from_yaml, to_yaml, with_kind

PROFILED = 10  # steps that a bare `--profile` measures


def main(arguments: list[str]) -> None:
    """Resolve the configuration (preset, then file, then the command line) and train."""
    from diffpref.presets import PRESETS, preset

    if arguments and arguments[0] in ("-h", "--help"):
        print(_usage(list(PRESETS)))
        return
    named = bool(arguments) and not arguments[0].startswith("-")
    chosen, rest = (preset(arguments[0]), arguments[1:]) if named else (Config(), arguments)
    resume, rest = take_flag(rest, "--resume")
    steps, rest = take_count(rest, "--profile", PROFILED)
    print_config, rest = take_flag(rest, "--print-config")
    file, rest = take_value(rest, "--config")
    if file is not None:
        chosen = from_yaml(Path(file), chosen)
    elif not named:
        raise UserError("train needs a preset or --config FILE; `diffpref train --help` lists the presets")
    for group in ("objective", "points"):
        name, rest = take_value(rest, f"--{group}.name")
        if name is not None:
            chosen = with_kind(chosen, group, name)
    config = check(parse(Config, rest, f"diffpref train {arguments[0]}", chosen, switches=False))
    if print_config:
        print(to_yaml(config), end="")
        return

    from diffpref.train.loop import train

    run = train(config, resume=resume, profile=steps)
    if os.environ.get("RANK", "0") == "0":
        print(run)


def _usage(presets: list[str]) -> str:
    return f"""usage: diffpref train [PRESET] [--config FILE] [--dotted.key VALUE ...] [--resume] [--profile [STEPS]]
                      [--print-config]

presets: {", ".join(presets)}

  --config FILE      YAML with the keys that differ from the preset, or a run's config.yaml alone
  --dotted.key VALUE one key, e.g. --train.max-steps 20 or --objective.beta 2000; --objective.name and --points.name
                     choose another kind, with its own defaults
  --resume           go on from the newest valid checkpoint of output_dir, or start if there is none
  --profile [STEPS]  measure where the time of so many steps goes (10), into output_dir/profile: a table, and a trace
                     of two more steps for chrome://tracing or ui.perfetto.dev
  --print-config     print the resolved configuration as YAML and end

`diffpref train PRESET --help` lists every key with the preset's value."""
