"""`diffpref compare`: a paired comparison of two folders of generated images."""

import json as json_format
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diffpref.cli.parsing import parse

if TYPE_CHECKING:
    from diffpref.evaluate.compare import Comparison


@dataclass(frozen=True)
class Compare:
    """Compare two folders of images of the same prompts and seeds; a folder without scores is scored first."""

    base: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
    """The base model's images."""
    tuned: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED")]
    """The tuned model's images; the win rate is theirs."""
    scorer: str = "embedded-judge"
    """The reward model."""
    device: str = "cpu"
    """Where the reward model runs."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PAGE.html")] = None
    """Write a page with the images side by side."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as one JSON object."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    options = parse(Compare, arguments, prog="diffpref compare")
    from diffpref.evaluate.compare import compare
    from diffpref.scorers.base import load_scorer

    result = compare(options.base, options.tuned, load_scorer(options.scorer, options.device))
    if options.output is not None:
        from diffpref.report.page import write_report

        title = f"{options.tuned.resolve().name} against {options.base.resolve().name}"
        command = f"diffpref compare {shlex.join(arguments)}"
        write_report(options.output, title=title, run=None, comparison=result, reproduce=[command])
    if options.json:
        page = {} if options.output is None else {"page": str(options.output)}
        json_format.dump({**result.summary(), **page}, sys.stdout, indent=2)
        print()
        return
    print(describe(result))
    if options.output is not None:
        print(f"page           {options.output}")


def describe(result: "Comparison") -> str:
    """The comparison in a few lines of text."""
    effect = "" if result.effect_size is None else f", effect size {result.effect_size:.2f}"
    return "\n".join(
        [
            f"win rate       {result.win_rate:.1%} of tuned over base "
            f"(95% interval {result.win_rate_low:.1%} to {result.win_rate_high:.1%})",
            f"pairs          {result.images} of {result.prompts} prompts: "
            f"{result.wins} won, {result.losses} lost, {result.ties} tied",
            f"mean score     {result.mean_a:.4f} base, {result.mean_b:.4f} tuned, by {result.scorer} {result.version}",
            f"difference     {result.mean_difference:+.4f} "
            f"(95% interval {result.mean_difference_low:+.4f} to {result.mean_difference_high:+.4f}{effect})",
            f"sign test      p = {result.p_value:.2g}, over prompts",
        ]
    )
