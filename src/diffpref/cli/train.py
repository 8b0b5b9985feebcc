"""`diffpref train [PRESET] [--config FILE] [--dotted.key VALUE] [--resume] [--profile] [--print-config]`."""

import os

from diffpref.cli.configured import configured
from diffpref.cli.parsing import take_count, take_flag
from diffpref.train.config_file import to_yaml

PROFILED = 10  # steps that a bare `--profile` measures


def main(arguments: list[str]) -> None:
    """Resolve the configuration (preset, then file, then the command line) and train."""
    from diffpref.presets import PRESETS

    if arguments and arguments[0] in ("-h", "--help"):
        print(_usage(list(PRESETS)))
        return
    resume, rest = take_flag(arguments, "--resume")
    steps, rest = take_count(rest, "--profile", PROFILED)
    print_config, rest = take_flag(rest, "--print-config")
    config = configured(rest, "train")
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
