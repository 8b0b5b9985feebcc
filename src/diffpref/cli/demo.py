"""`diffpref demo`: the main job on the embedded default, in minutes, without a network."""

from dataclasses import dataclass

from diffpref.cli.parsing import parse


@dataclass(frozen=True)
class Options:
    """Align the embedded model on the embedded preferences, measure it on held-out prompts and write a report."""

    output_dir: str = "runs/demo"
    """Where everything goes; a demo that was cut goes on there."""
    seed: int = 0
    """The training seed."""
    json: bool = False
    """Print the result as JSON."""


def main(arguments: list[str]) -> None:
    """Run the demo and print its result."""
    options = parse(Options, arguments, "diffpref demo")

    import json
    import os
    from pathlib import Path

    os.environ["HF_HUB_OFFLINE"] = "1"

    from diffpref.demo import run_demo, summary

    result = run_demo(Path(options.output_dir), options.seed)
    print(json.dumps(result) if options.json else summary(result))
