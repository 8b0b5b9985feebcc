"""`diffpref data label | select | pairs`: datasets made from datasets."""

import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from diffpref.cli.parsing import parse
from diffpref.errors import UserError

if TYPE_CHECKING:
    from diffpref.data.dataset import PreferenceDataset
    from diffpref.data.engine import Running
    from diffpref.data.schema import DatasetSummary


@dataclass(frozen=True)
class LabelArguments:
    """Score every image for its prompt, as training with data.choice_model and `data select` read the scores.

    Nothing is scored twice: cut off, or called again with another rule, it goes on from what its ledger holds.
    """

    dataset: Annotated[Positional[Path], arg(metavar="DATASET")]
    """A dataset in the normal form, of pairs or single images."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    scorer: str = "embedded-judge"
    """The reward models, with commas between them: names, NAME=WEIGHTS with weights of one's own, or Python files with
    a function load(device). All of them see an image in one pass."""
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the reward models' weights, each its own when not given; scores are always fp32."""
    rule: Literal["mean", "majority", "agree"] | None = None
    """Give pairs new labels: by the mean of standardised score differences, by votes, or only where all agree."""
    device: str = "cpu"
    """Where the reward models run; with `cuda`, workers and ranks take a device each."""
    workers: int = 1
    """Processes that score, on this machine; more machines or GPUs: torchrun -m diffpref data label ..."""
    engine: Literal["local", "ray"] = "local"
    """`ray` scores on a Ray cluster whose machines all see the ledger's folder and the dataset."""
    ledger: Path | None = None
    """Where scores are kept for ever; DATASET.answers beside the dataset when not given."""
    split: str = "train"
    """The split to read."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


@dataclass(frozen=True)
class SelectArguments:
    """Keep the images with the highest scores, as single images (Diffusion-DRO's experts), or their pairs."""

    dataset: Annotated[Positional[Path], arg(metavar="DATASET")]
    """A dataset with scores, of pairs or single images."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    scorer: str = "embedded-judge"
    """Whose scores."""
    top: int = 500
    """How many images."""
    per_prompt: int = 0
    """At most so many images of a prompt; 0 sets no limit."""
    pairs: bool = False
    """Keep whole pairs, by the scores of their preferred images."""
    split: str = "train"
    """The split to read."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


@dataclass(frozen=True)
class PairsArguments:
    """Pair expert images, as chosen, with images that a model drew for the same prompts, as rejected (SPIN).

    With --pairing, pair single images of the same prompt by their scores: data pairs DATASET OUTPUT --pairing all.
    """

    folders: Annotated[tuple[Path, ...], Positional, arg(metavar="EXPERTS GENERATED OUTPUT | DATASET OUTPUT")]
    """Experts are single images, or pairs, whose preferred images are taken; GENERATED is what `generate` filled."""
    pairing: Literal["all", "best-worst", "adjacent"] | None = None
    """Of a prompt's images pair every two, the best and the worst, or each with the next lower one."""
    by: str = "embedded-judge"
    """Whose scores decide, with --pairing."""
    min_margin: float = 0.0
    """Leave out pairs whose scores differ by less, with --pairing."""
    split: str = "train"
    """The split to read."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""

    @property
    def dataset(self) -> Path:
        """What is read."""
        return self.folders[0]

    @property
    def output(self) -> Path:
        """What is written."""
        return self.folders[-1]


def run_label(arguments: list[str]) -> None:
    """`diffpref data label DATASET OUTPUT`."""
    given = parse(LabelArguments, arguments, "diffpref data label")
    from diffpref.data.labelling import label_dataset
    from diffpref.data.scoring import scorers_named

    running = running_of(given.workers, given.engine, given.ledger, given.device)
    scorers = scorers_named(given.scorer, given.device, given.precision)
    if summary := label_dataset(opened(given), given.output, scorers, given.rule, running, given.overwrite):
        tell(given, summary)


def run_select(arguments: list[str]) -> None:
    """`diffpref data select DATASET OUTPUT`."""
    given = parse(SelectArguments, arguments, "diffpref data select")
    if given.top < 1:
        raise UserError(f"--top: {given.top} is not above 0")
    if given.per_prompt < 0:
        raise UserError(f"--per-prompt: {given.per_prompt} is not 0 or above")
    from diffpref.data.annotate import select_top

    made = select_top(
        opened(given), given.output, given.scorer, given.top, given.per_prompt, given.overwrite, given.pairs
    )
    tell(given, made)


def run_pairs(arguments: list[str]) -> None:
    """`diffpref data pairs EXPERTS GENERATED OUTPUT`, or `DATASET OUTPUT --pairing HOW`."""
    given = parse(PairsArguments, arguments, "diffpref data pairs")
    wanted = "DATASET and OUTPUT" if given.pairing else "EXPERTS, GENERATED and OUTPUT, or --pairing for scored images"
    if len(given.folders) != (2 if given.pairing else 3):
        raise UserError(f"data pairs takes {wanted}, not {len(given.folders)} folders")
    if not given.min_margin >= 0:
        raise UserError(f"--min-margin: {given.min_margin} is not 0 or above")
    if given.pairing:
        from diffpref.data.scored_pairs import pair_scored

        summary = pair_scored(opened(given), given.output, given.by, given.pairing, given.min_margin, given.overwrite)
    else:
        if given.min_margin or given.by != PairsArguments.by:
            raise UserError("--by and --min-margin are of --pairing all, best-worst or adjacent, which is not given")
        from diffpref.data.annotate import pair_with_generated
        from diffpref.evaluate.folders import read_folder

        drawn = [(image.prompt, image.file) for image in read_folder(given.folders[1])]
        summary = pair_with_generated(opened(given), drawn, given.output, given.overwrite)
    tell(given, summary)


def running_of(
    workers: int, engine: Literal["local", "ray"], ledger: Path | None = None, device: str = "cpu"
) -> "Running":
    if workers < 1:
        raise UserError(f"--workers: {workers} is not above 0")
    if engine == "ray" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--engine ray has workers of its own: start it once, without torchrun or accelerate launch")
    from diffpref.data.engine import Running

    return Running(workers, engine, ledger, gpus=int(device.startswith("cuda")))


def opened(given: Any) -> "PreferenceDataset":
    from diffpref.data.dataset import PreferenceDataset

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken metadata beside good pixels
    return PreferenceDataset.open(given.dataset, given.split)


def tell(given: Any, summary: "DatasetSummary") -> None:
    """The counts go to stdout."""
    if given.json:
        print(json.dumps(asdict(summary), indent=2))
        return
    print(f"{given.output}: {summary.kept} {summary.format.split('-')[1]} of {summary.read}")
    for verb, counts in (("dropped", summary.dropped), ("without", summary.missing)):
        for reason, count in counts.items():
            print(f"  {verb} {count:>8}  {reason}")
