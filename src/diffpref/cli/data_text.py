"""`diffpref data caption | perturb`: the texts of images that DCPO trains on."""

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from tyro.conf import OmitArgPrefixes, Positional, arg

from diffpref.captioners.base import CaptionOptions, identity, load_captioner
from diffpref.cli.data_make import opened, running_of, tell
from diffpref.cli.parsing import parse
from diffpref.errors import UserError
from diffpref.perturbers import base as perturbing
from diffpref.perturbers.base import PerturbOptions, load_perturber

Tool = TypeVar("Tool", CaptionOptions, PerturbOptions)


@dataclass(frozen=True)
class CaptionArguments:
    """Write a caption of its own for every image, as training with data.captions: image reads them (DCPO-c)."""

    dataset: Annotated[Positional[Path], arg(metavar="DATASET")]
    """A dataset in the normal form, of pairs or single images."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    tool: OmitArgPrefixes[CaptionOptions] = field(default_factory=CaptionOptions)
    workers: int = 1
    """Processes that caption, on this machine; more machines or GPUs: torchrun -m diffpref data caption ..."""
    engine: Literal["local", "ray"] = "local"
    """`ray` captions on a Ray cluster whose machines all see the ledger's folder and the dataset."""
    ledger: Path | None = None
    """Where captions are kept for ever; DATASET.answers beside the dataset when not given."""
    split: str = "train"
    """The split to read."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


@dataclass(frozen=True)
class PerturbArguments:
    """Change the text of every pair's worse image, so that it fits worse (DCPO-p and DCPO-h)."""

    dataset: Annotated[Positional[Path], arg(metavar="DATASET")]
    """A dataset of pairs in the normal form."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    mode: Literal["p", "h"] = "p"
    """The paper's modes. p: the better image keeps the prompt, the other one gets the prompt perturbed. h: both keep
    the captions that `data caption` wrote, the other one's is perturbed."""
    tool: OmitArgPrefixes[PerturbOptions] = field(default_factory=PerturbOptions)
    workers: int = 1
    """Processes that perturb, on this machine; more machines or GPUs: torchrun -m diffpref data perturb ..."""
    engine: Literal["local", "ray"] = "local"
    """`ray` perturbs on a Ray cluster whose machines all see the ledger's folder and the dataset."""
    ledger: Path | None = None
    """Where texts are kept for ever; DATASET.answers beside the dataset when not given."""
    split: str = "train"
    """The split to read."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


def run_caption(arguments: list[str]) -> None:
    """`diffpref data caption DATASET OUTPUT`."""
    given = parse(CaptionArguments, arguments, "diffpref data caption")
    who, tool = identity(given.tool), _placed(given.tool)
    from diffpref.data.captioning import caption_dataset

    running = running_of(given.workers, given.engine, given.ledger, tool.device)
    load = partial(load_captioner, tool)
    if summary := caption_dataset(opened(given), given.output, load, who, running, given.overwrite):
        tell(given, summary)


def run_perturb(arguments: list[str]) -> None:
    """`diffpref data perturb DATASET OUTPUT`."""
    given = parse(PerturbArguments, arguments, "diffpref data perturb")
    who, tool = perturbing.identity(given.tool), _placed(given.tool)
    from diffpref.data.captioning import perturb_dataset

    running = running_of(given.workers, given.engine, given.ledger, tool.device)
    load = partial(load_perturber, tool)
    if summary := perturb_dataset(opened(given), given.output, load, who, given.mode, running, given.overwrite):
        tell(given, summary)


def _placed(tool: Tool) -> Tool:
    """The options; refused are several ranks of a model that would spread over all GPUs in each of them."""
    if tool.device == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--device auto spreads one model over all GPUs; under torchrun give --device cuda")
    return tool
