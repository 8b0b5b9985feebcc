"""`diffpref train PRESET [--config FILE] [--dotted.key VALUE] [--resume] [--print-config]`."""

from pathlib import Path

from diffpref.cli.parsing import parse, take_flag, take_value
from diffpref.errors import UserError
from diffpref.train.config import Config, check, from_yaml, to_yaml


def main(arguments: list[str]) -> None:
    """Resolve the configuration (preset, then file, then the command line) and train."""
    from diffpref.presets import PRESETS, preset

    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(list(PRESETS)))
        if not arguments:
            raise UserError("train needs a preset")
        return
    chosen = preset(arguments[0])
    rest = arguments[1:]
    resume, rest = take_flag(rest, "--resume")
    print_config, rest = take_flag(rest, "--print-config")
    file, rest = take_value(rest, "--config")
    if file is not None:
        chosen = from_yaml(Path(file), chosen)
    config = check(parse(Config, rest, f"diffpref train {arguments[0]}", chosen))
    if print_config:
        print(to_yaml(config), end="")
        return

    from diffpref.train.loop import train

    train(config, resume=resume)


def _usage(presets: list[str]) -> str:
    return f"""usage: diffpref train PRESET [--config FILE] [--dotted.key VALUE ...] [--resume] [--print-config]

presets: {", ".join(presets)}

  --config FILE      YAML with the keys that differ from the preset
  --dotted.key VALUE one key, e.g. --train.max-steps 20 or --objective.beta 2000
  --resume           go on from the newest valid checkpoint of output_dir, or start if there is none
  --print-config     print the resolved configuration as YAML and end

`diffpref train PRESET --help` lists every key with the preset's value."""
