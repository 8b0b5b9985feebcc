"""`diffpref score`: scores for folders of generated images."""

import dataclasses
import json as json_format
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diffpref.cli.parsing import parse
from diffpref.errors import UserError


@dataclass(frozen=True)
class Score:
    """Score folders of generated images; the scores are kept in FOLDER/scores/SCORER.parquet."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER [FOLDER ...]")]
    """Folders with metadata.jsonl, or with NNN/caption.txt beside NNN/*.png."""
    scorer: str = "embedded-judge"
    """The reward model."""
    batch_size: int = 64
    """Images scored at once."""
    device: str = "cpu"
    """Where the reward model runs."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON list with an object for each folder."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    options = parse(Score, arguments, prog="diffpref score")
    if not options.folders:
        raise UserError("name at least one folder of generated images to score")
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {options.batch_size}")
    from diffpref.evaluate.score import score_folder
    from diffpref.scorers.base import load_scorer

    scorer = load_scorer(options.scorer, options.device)
    summaries = [score_folder(folder, scorer, options.batch_size).summary() for folder in options.folders]
    if options.json:
        json_format.dump([dataclasses.asdict(summary) for summary in summaries], sys.stdout, indent=2)
        print()
        return
    for summary in summaries:
        error = "" if summary.standard_error is None else f" ± {summary.standard_error:.4f}"
        print(f"{summary.folder}: mean {summary.mean:.4f}{error} ({_counts(summary.images, summary.prompts)})")


def _counts(images: int, prompts: int) -> str:
    return f"{images} image{'s' * (images != 1)} of {prompts} prompt{'s' * (prompts != 1)}"
