"""`diffpref compare`: a paired comparison of folders of generated images with a base folder."""

import json as json_format
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from diffpref.cli.parsing import parse
from diffpref.errors import UserError

if TYPE_CHECKING:
    from diffpref.evaluate.compare import Comparison
    from diffpref.evaluate.results import Result


@dataclass(frozen=True)
class Compare:
    """Compare folders of images of the same prompts and seeds; a folder without scores is scored first."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="BASE TUNED [TUNED ...]")]
    """The base model's images, then those of each tuned model; the win rate is the tuned model's over the base."""
    scorer: str = "embedded-judge"
    """The reward models, with commas between: NAME, NAME=WEIGHTS or FILE.py each."""
    optimised: str | None = None
    """The scorer that the training aimed at, by which the others are held out; the first of --scorer if not given."""
    category: str | None = None
    """Only prompts of these categories, with commas between."""
    features: str = "pixels"
    """What diversity and drift are measured by: pixels, clip-h or clip-l (or =WEIGHTS after these), or none."""
    largest_fall: float = 0.2
    """The share of its diversity that a tuned model may lose without an alarm."""
    device: str = "cpu"
    """Where the reward models run."""
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the reward models' weights, each its own when not given; scores are always fp32."""
    combine: str | None = None
    """One more result by a combination of the scorers, as pickscore:0.5,hpsv2.1:0.5."""
    combine_by: Literal["sum", "zscore", "rank"] = "zscore"
    """What is weighted and added: scores as they are, standardised over all images, or ranks within a prompt."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PAGE.html|FOLDER")] = None
    """Write a page with the images side by side: one file with some of them, or a folder with all."""
    gallery: int = 8
    """Pairs on the page of each kind: drawn at random, largest wins, largest losses."""
    picture_size: int = 512
    """Pixels of the longer side, to which larger pictures are reduced on the page."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as one JSON object, several as a list."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    options = parse(Compare, arguments, prog="diffpref compare")
    _check(options)
    from diffpref.evaluate.combining import parse_combination
    from diffpref.evaluate.compare import compare
    from diffpref.evaluate.features import load_features
    from diffpref.scorers.base import load_scorer

    if options.output is not None:
        from diffpref.report.output import refuse_foreign

        refuse_foreign(options.output)
    comparison = compare(
        options.folders,
        [load_scorer(name, options.device, options.precision) for name in _listed(options.scorer)],
        load_features(options.features, options.device),
        optimised=options.optimised,
        categories=_listed(options.category),
        largest_fall=options.largest_fall,
        combination=parse_combination(options.combine, options.combine_by) if options.combine else None,
    )
    if options.output is not None:
        from diffpref.report.page import write_report

        write_report(
            options.output,
            title=f"{', '.join(comparison.names[1:])} against {comparison.names[0]}",
            run=None,
            comparison=comparison,
            reproduce=[f"diffpref compare {shlex.join(arguments)}"],
            each=options.gallery,
            picture_size=options.picture_size,
        )
    if options.json:
        page = {} if options.output is None else {"page": str(options.output)}
        found = [{**summary, **page} for summary in comparison.summaries()]
        json_format.dump(found[0] if len(found) == 1 else found, sys.stdout, indent=2)
        print()
        return
    print(describe(comparison))
    if options.output is not None:
        print(f"page           {options.output}")


def _check(options: Compare) -> None:
    if len(options.folders) < 2:
        raise UserError("name the folder of the base model's images and at least one other: BASE TUNED [TUNED ...]")
    if not 0 <= options.largest_fall <= 1:
        raise UserError(f"--largest-fall: {options.largest_fall} is not from 0 to 1")
    for key in ("gallery", "picture_size"):
        if getattr(options, key) < 1:
            raise UserError(f"--{key.replace('_', '-')}: {getattr(options, key)} is not above 0")
    for key in ("scorer", "category"):
        if getattr(options, key) is not None and not _listed(getattr(options, key)):
            raise UserError(f"--{key} names no {key}")


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def describe(comparison: "Comparison") -> str:
    """The comparison in text: alarms, a few lines for a single result, a table of several, diversity and drift."""
    names = dict(zip(comparison.folders, comparison.names, strict=True))
    results = [*comparison.results, *comparison.by_category]
    lines = [f"ALARM          {names[alarm.folder]}: {alarm.text}" for alarm in comparison.alarms]
    if len(comparison.results) == 1:
        lines += _single(results[0])
    if len(results) > 1:
        lines += [
            *_table(results, names),
            f"p is the sign test's over prompts; Holm is p corrected for {len(results)} results",
        ]
    for folder, spread in zip(comparison.folders[1:], comparison.spreads, strict=False):
        of = "" if len(comparison.folders) == 2 else f"{names[folder]}: "
        if spread.diversity_a is not None:
            change = "" if spread.diversity_change is None else f" ({spread.diversity_change:+.0%})"
            among = "one prompt" if spread.among == "prompt" else "different prompts"
            lines.append(
                f"diversity      {of}{spread.diversity_a:.4g} base, {spread.diversity_b:.4g} tuned{change}: "
                f"distance between images of {among}, {spread.features} features"
            )
        low, high = spread.drift.low, spread.drift.high
        lines.append(
            f"drift          {of}{spread.drift.value:.4g} from the base (95% interval {low:.4g} to {high:.4g})"
        )
    return "\n".join(lines)


def _single(result: "Result") -> list[str]:
    effect = "" if result.effect_size is None else f", effect size {result.effect_size:.2f}"
    return [
        f"win rate       {result.win_rate:.1%} of tuned over base "
        f"(95% interval {result.win_rate_low:.1%} to {result.win_rate_high:.1%}): {result.verdict}",
        f"pairs          {result.images} of {result.prompts} prompts: "
        f"{result.wins} won, {result.losses} lost, {result.ties} tied",
        f"mean score     {result.mean_a:.4f} base, {result.mean_b:.4f} tuned, by {result.scorer} {result.version}",
        f"difference     {result.mean_difference:+.4f} "
        f"(95% interval {result.mean_difference_low:+.4f} to {result.mean_difference_high:+.4f}{effect})",
        f"sign test      p = {result.p_value:.2g}, over prompts",
    ]


def _table(results: "list[Result]", names: dict[Path, str]) -> list[str]:
    rows = [_cells(result, names) for result in results]
    if not any(result.category for result in results):
        for row in rows:
            del row["category"]
    widths = {key: max(len(key.strip()), *(len(row[key]) for row in rows)) for key in rows[0]}
    rows.insert(0, {key: key.strip() for key in rows[0]})
    words = ("folder", "scorer", "category", "verdict")
    return [
        "  ".join(
            cell.ljust(widths[key]) if key in words else cell.rjust(widths[key]) for key, cell in row.items()
        ).rstrip()
        for row in rows
    ]


def _cells(result: "Result", names: dict[Path, str]) -> dict[str, str]:
    return {
        "folder": names[result.folder_b],
        "scorer": result.scorer,
        "category": result.category or "(all)",
        "pairs": str(result.images),
        "win rate": f"{result.win_rate:.1%}",
        "95% interval": f"{result.win_rate_low:.1%} to {result.win_rate_high:.1%}",
        "base": f"{result.mean_a:.4g}",
        "tuned": f"{result.mean_b:.4g}",
        "difference": f"{result.mean_difference:+.4g}",
        "95% interval ": f"{result.mean_difference_low:+.4g} to {result.mean_difference_high:+.4g}",
        "effect": "" if result.effect_size is None else f"{result.effect_size:+.2f}",
        "p": f"{result.p_value:.2g}",
        "Holm": f"{result.p_holm:.2g}",
        "verdict": result.verdict,
    }
