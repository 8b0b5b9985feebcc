"""`diffpref score`: scores for folders of generated images and for datasets."""

import dataclasses
import json as json_format
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from diffpref.cli.parsing import parse
from diffpref.cli.tables import aligned
from diffpref.errors import UserError

if TYPE_CHECKING:
    from diffpref.evaluate.score import Summary


@dataclass(frozen=True)
class Score:
    """Score images by any number of reward models, in one pass; scores are kept in FOLDER/scores/SCORER.parquet.

    Nothing is scored twice: cut off, or called again with a further scorer, it goes on from what its ledger holds.
    More GPUs or machines: torchrun -m diffpref score ..., or accelerate launch -m diffpref score ...
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER [FOLDER ...]")]
    """Folders with metadata.jsonl, or with NNN/caption.txt beside NNN/*.png, or datasets in the normal form, whose
    scores stand in DATASET.scores/ beside them."""
    scorer: str = "embedded-judge"
    """The reward models, with commas between them: names, NAME=WEIGHTS with weights of one's own, or Python files with
    a function load(device)."""
    batch_size: int = 64
    """Images scored at once."""
    device: str = "cpu"
    """Where the reward models run; with `cuda`, workers and ranks take a device each."""
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the reward models' weights, each its own when not given; scores are always fp32."""
    combine: str | None = None
    """One more score by a combination of the scorers, as pickscore:0.5,hpsv2.1:0.5, over all folders together."""
    combine_by: Literal["sum", "zscore", "rank"] = "zscore"
    """What is weighted and added: scores as they are, standardised over all images, or ranks within a prompt."""
    workers: int = 1
    """Processes that score, on this machine."""
    engine: Literal["local", "ray"] = "local"
    """`ray` scores on a Ray cluster whose machines all see the images and the ledger."""
    ledger: Path | None = None
    """Where scores are kept for ever; FOLDER/scores/ledger, or DATASET.answers, when not given."""
    split: str = "train"
    """The split of a dataset."""
    overwrite: bool = False
    """Replace scores of another version of a scorer."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON list with an object for each folder and scorer."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    options = parse(Score, arguments, prog="diffpref score")
    if not options.folders:
        raise UserError("name at least one folder of generated images, or dataset, to score")
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {options.batch_size}")
    from diffpref.cli.data_make import running_of
    from diffpref.data.engine import is_main
    from diffpref.data.scoring import scorers_named
    from diffpref.evaluate.combining import parse_combination
    from diffpref.evaluate.score import combined, score
    from diffpref.evaluate.targets import open_target

    combination = parse_combination(options.combine, options.combine_by) if options.combine else None
    running = running_of(options.workers, options.engine, options.ledger, options.device)
    targets = [open_target(folder, options.split, options.ledger) for folder in options.folders]
    scorers = scorers_named(options.scorer, options.device, options.precision)
    found = score(targets, scorers, options.batch_size, running, options.overwrite)
    if not is_main():
        return
    if combination is not None:
        found += combined(found, combination)
    summaries = [summary for scores in found for summary in scores.summaries()]
    if options.json:
        json_format.dump([dataclasses.asdict(summary) for summary in summaries], sys.stdout, indent=2)
        print()
        return
    print(table(summaries))


def table(summaries: "list[Summary]") -> str:
    """Folders x scorers in aligned columns: mean, standard error by prompt, counts."""
    rows = [("folder", "scorer", "mean", "error", "images", "prompts", "missing")]
    for each in summaries:
        mean, error = ("-" if value is None else f"{value:.4f}" for value in (each.mean, each.standard_error))
        name = f"{each.folder} {each.side}".rstrip()
        rows.append((name, each.scorer, mean, error, str(each.images), str(each.prompts), str(each.missing)))
    return aligned(rows, texts=2)
