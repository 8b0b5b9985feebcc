"""`diffpref plan PRESET [--config FILE] [--dotted.key VALUE] [--gpu NAME] [--pairs N] [--json]`."""

import json

from diffpref.cli.configured import configured
from diffpref.cli.parsing import take_flag, take_value
from diffpref.errors import UserError


def main(arguments: list[str]) -> None:
    """Resolve the configuration as `train` does, and tell what the run would take."""
    if arguments and arguments[0] in ("-h", "--help"):
        from diffpref.presets import PRESETS

        print(_usage(list(PRESETS)))
        return
    as_object, rest = take_flag(arguments, "--json")
    name, rest = take_value(rest, "--gpu")
    pairs, rest = take_value(rest, "--pairs")
    config = configured(rest, "plan")
    if pairs is not None and not pairs.isdecimal():
        raise UserError(f"--pairs: {pairs} is no whole number")
    from diffpref.plan.gpus import gpu

    card = gpu(name) if name is not None else None

    from diffpref.plan.planning import make_plan
    from diffpref.plan.telling import as_json, as_text

    plan = make_plan(config, card, None if pairs is None else int(pairs))
    print(json.dumps(as_json(plan), indent=2) if as_object else as_text(plan, rest[0]))


def _usage(presets: list[str]) -> str:
    return f"""usage: diffpref plan [PRESET] [--config FILE] [--dotted.key VALUE ...] [--gpu NAME] [--pairs N] [--json]

What a run would take, before it starts and without its weights: parameters, GPU memory by part, disk, FLOPs, and the
time on GPUs; and which settings fit. Takes what `train` takes, and

  --gpu NAME  one GPU alone, e.g. rtx-4090 or h100
  --pairs N   plan the store for so many pairs (or images) instead of those of data.path
  --json      print an object: bytes, FLOPs, days

presets: {", ".join(presets)}"""
