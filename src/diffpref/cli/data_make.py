"""`diffpref data caption | label | select | pairs`: datasets made from datasets."""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from diffpref.cli.parsing import parse
from diffpref.errors import UserError

if TYPE_CHECKING:
    from diffpref.data.dataset import PreferenceDataset
    from diffpref.data.schema import DatasetSummary


@dataclass(frozen=True)
class CaptionArguments:
    """Write a caption of its own for every image, as training with data.captions: image reads them (DCPO)."""

    dataset: Annotated[Positional[Path], arg(metavar="DATASET")]
    """A dataset in the normal form, of pairs or single images."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    captioner: Literal["embedded"] = "embedded"
    """What looks at the images: `embedded` names what it can measure in pictures of the embedded world."""
    split: str = "train"
    """The split to read."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


@dataclass(frozen=True)
class LabelArguments:
    """Score every image for its prompt, as training with data.choice_model and `data select` read the scores."""

    dataset: Annotated[Positional[Path], arg(metavar="DATASET")]
    """A dataset in the normal form, of pairs or single images."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    scorer: str = "embedded-judge"
    """The reward model."""
    device: str = "cpu"
    """Where the reward model runs."""
    split: str = "train"
    """The split to read."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


@dataclass(frozen=True)
class SelectArguments:
    """Keep the images with the highest scores, as single images (Diffusion-DRO's experts)."""

    dataset: Annotated[Positional[Path], arg(metavar="DATASET")]
    """A dataset with scores, of pairs or single images."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    scorer: str = "embedded-judge"
    """Whose scores."""
    top: int = 500
    """How many images."""
    split: str = "train"
    """The split to read."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


@dataclass(frozen=True)
class PairsArguments:
    """Pair expert images, as chosen, with images that a model drew for the same prompts, as rejected (SPIN)."""

    dataset: Annotated[Positional[Path], arg(metavar="EXPERTS")]
    """A dataset of single images, or of pairs, whose preferred images are taken."""
    generated: Annotated[Positional[Path], arg(metavar="GENERATED")]
    """A folder that `diffpref generate` filled."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    split: str = "train"
    """The split to read."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


def run_caption(arguments: list[str]) -> None:
    """`diffpref data caption DATASET OUTPUT`."""
    given = parse(CaptionArguments, arguments, "diffpref data caption")
    from diffpref.data.annotate import caption_dataset
    from diffpref.embedded.describer import Describer

    _tell(given, caption_dataset(_opened(given), given.output, Describer(), {}, given.overwrite))


def run_label(arguments: list[str]) -> None:
    """`diffpref data label DATASET OUTPUT`."""
    given = parse(LabelArguments, arguments, "diffpref data label")
    from diffpref.data.annotate import label_dataset
    from diffpref.scorers.base import load_scorer

    dataset = _opened(given)
    _tell(given, label_dataset(dataset, given.output, load_scorer(given.scorer, given.device), given.overwrite))


def run_select(arguments: list[str]) -> None:
    """`diffpref data select DATASET OUTPUT`."""
    given = parse(SelectArguments, arguments, "diffpref data select")
    if given.top < 1:
        raise UserError(f"--top: {given.top} is not above 0")
    from diffpref.data.annotate import select_top

    _tell(given, select_top(_opened(given), given.output, given.scorer, given.top, given.overwrite))


def run_pairs(arguments: list[str]) -> None:
    """`diffpref data pairs EXPERTS GENERATED OUTPUT`."""
    given = parse(PairsArguments, arguments, "diffpref data pairs")
    from diffpref.data.annotate import pair_with_generated
    from diffpref.evaluate.folders import read_folder

    drawn = [(image.prompt, image.file) for image in read_folder(given.generated)]
    _tell(given, pair_with_generated(_opened(given), drawn, given.output, given.overwrite))


Arguments = CaptionArguments | LabelArguments | SelectArguments | PairsArguments


def _opened(given: Arguments) -> "PreferenceDataset":
    from diffpref.data.dataset import PreferenceDataset

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken metadata beside good pixels
    return PreferenceDataset.open(given.dataset, given.split)


def _tell(given: Arguments, summary: "DatasetSummary") -> None:
    """The counts go to stdout."""
    if given.json:
        print(json.dumps(asdict(summary), indent=2))
        return
    print(f"{given.output}: {summary.kept} {summary.format.split('-')[1]} of {summary.read}")
    for verb, counts in (("dropped", summary.dropped), ("without", summary.missing)):
        for reason, count in counts.items():
            print(f"  {verb} {count:>8}  {reason}")
