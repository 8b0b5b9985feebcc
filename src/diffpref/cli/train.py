"""`diffpref train [PRESET] [--config FILE] [--dotted.key VALUE] [--resume] [--max-time TIME] ...`."""

import os
import shlex
import time

from diffpref.cli.configured import configured
from diffpref.cli.parsing import seconds_of, take_count, take_flag, take_value
from diffpref.errors import Stopped
from diffpref.train.config_file import to_yaml

PROFILED = 10  # steps that a bare `--profile` measures


def main(arguments: list[str]) -> None:
    """Resolve the configuration (preset, then file, then the command line) and train."""
    started, again = time.monotonic(), arguments
    from diffpref.presets import PRESETS

    if arguments and arguments[0] in ("-h", "--help"):
        print(_usage(list(PRESETS)))
        return
    resume, rest = take_flag(arguments, "--resume")
    steps, rest = take_count(rest, "--profile", PROFILED)
    print_config, rest = take_flag(rest, "--print-config")
    limit, rest = take_value(rest, "--max-time")
    until = None if limit is None else started + seconds_of(limit, "--max-time")
    config = configured(rest, "train")
    if print_config:
        print(to_yaml(config), end="")
        return

    from diffpref.train.loop import train

    try:
        run = train(config, resume=resume, until=until, profile=steps)
    except Stopped as stopped:
        raise Stopped(f"{stopped}; go on with: {_resuming(again)}", stopped.code) from None
    if os.environ.get("RANK", "0") == "0":
        print(run)


def _resuming(arguments: list[str]) -> str:
    """The command that goes on with the run of this one."""
    launcher = "torchrun ... -m " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    resume = [] if "--resume" in arguments else ["--resume"]
    return launcher + shlex.join(["diffpref", "train", *arguments, *resume])


def _usage(presets: list[str]) -> str:
    return f"""usage: diffpref train [PRESET] [--config FILE] [--dotted.key VALUE ...] [--resume] [--max-time TIME]
                      [--profile [STEPS]] [--print-config]

presets: {", ".join(presets)}

  --config FILE      YAML with the keys that differ from the preset, or a run's config.yaml alone
  --dotted.key VALUE one key, e.g. --train.max-steps 20 or --objective.beta 2000; --objective.name and --points.name
                     choose another kind, with its own defaults
  --resume           go on from the newest valid checkpoint of output_dir, or start if there is none
  --max-time TIME    stop after 3h30m, 45m, 2d, 90s or so many seconds: the step is finished, a checkpoint written, and
                     the exit code is 0. SIGINT (Ctrl-C), SIGTERM and SIGUSR1 do the same at any time, with the exit
                     codes 130, 143 and 138; a second SIGINT or SIGTERM ends the process at once
  --profile [STEPS]  measure where the time of so many steps goes (10), into output_dir/profile: a table, and a trace
                     of two more steps for chrome://tracing or ui.perfetto.dev
  --print-config     print the resolved configuration as YAML and end

`diffpref train PRESET --help` lists every key with the preset's value."""
