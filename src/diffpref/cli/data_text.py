"""`diffpref data caption | perturb`: the texts of images that DCPO trains on."""

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from diffpref.captioners.base import Captioner, CaptionOptions, identity, load_captioner
from diffpref.cli.data_make import opened, running_of, tell
from diffpref.cli.parsing import parse
from diffpref.errors import UserError
from diffpref.perturbers import base as perturbing
from diffpref.perturbers.base import Perturber, PerturbOptions, load_perturber

T = TypeVar("T")
Tool = TypeVar("Tool", CaptionOptions, PerturbOptions)
BATCHES = 4  # of a tool's batches, that the engine hands it at once


@dataclass(frozen=True)
class CaptionArguments:
    """Write a caption of its own for every image, as training with data.captions: image reads them (DCPO-c)."""

    dataset: Annotated[Positional[Path], arg(metavar="DATASET")]
    """A dataset in the normal form, of pairs or single images."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    tool: OmitArgPrefixes[CaptionOptions] = field(default_factory=CaptionOptions)
    config: Path | None = None
    """A YAML file of the tool's options, captioner and template among them; the command line goes before it."""
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
    mode: Literal["c", "p", "h"] = "p"
    """The paper's modes. p: the better image keeps the prompt, the other one gets the prompt perturbed. h: both keep
    the captions that `data caption` wrote, the other one's is perturbed. c is `data caption` alone."""
    tool: OmitArgPrefixes[PerturbOptions] = field(default_factory=PerturbOptions)
    config: Path | None = None
    """A YAML file of the tool's options, perturber and template among them; the command line goes before it."""
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
    given = _parsed(CaptionArguments, CaptionOptions(), arguments, "diffpref data caption")
    who, tool = identity(given.tool), _checked(given, given.tool)
    from diffpref.data.captioning import caption_dataset

    running, load = running_of(given.workers, given.engine, given.ledger, tool.device), partial(_captioner, tool)
    batch = BATCHES * tool.batch_size
    if summary := caption_dataset(opened(given), given.output, load, who, running, given.overwrite, batch):
        tell(given, summary)


def run_perturb(arguments: list[str]) -> None:
    """`diffpref data perturb DATASET OUTPUT`."""
    given = _parsed(PerturbArguments, PerturbOptions(), arguments, "diffpref data perturb")
    if given.mode == "c":
        raise UserError("--mode c perturbs nothing: `diffpref data caption` writes the captions of both images")
    who, tool = perturbing.identity(given.tool), _checked(given, given.tool)
    from diffpref.data.captioning import perturb_dataset

    running, load = running_of(given.workers, given.engine, given.ledger, tool.device), partial(_perturber, tool)
    batch = BATCHES * tool.batch_size
    if summary := perturb_dataset(opened(given), given.output, load, who, given.mode, running, given.overwrite, batch):
        tell(given, summary)


def _parsed(record: type[T], options: CaptionOptions | PerturbOptions, arguments: list[str], prog: str) -> T:
    """The arguments; the tool's options start from the file of --config, if there is one."""
    given: Any = parse(record, arguments, prog)
    if given.config is None:
        return given
    from diffpref.train.config_file import from_yaml

    named: Any = record
    default = named(dataset=tyro.MISSING, output=tyro.MISSING, tool=from_yaml(given.config, options))
    return parse(record, arguments, prog, default)


def _checked(given: CaptionArguments | PerturbArguments, tool: Tool) -> Tool:
    """The options; refused are several processes of a model that would spread over all GPUs in each of them."""
    several = given.workers > 1 or given.engine == "ray" or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if tool.device == "auto" and several:
        raise UserError("--device auto spreads one model over all GPUs; of several processes give each --device cuda")
    return tool


def _captioner(tool: CaptionOptions) -> Captioner:
    return load_captioner(replace(tool, device=_own(tool.device)))


def _perturber(tool: PerturbOptions) -> Perturber:
    return load_perturber(replace(tool, device=_own(tool.device)))


def _own(device: str) -> str:
    """The device of this worker or rank, where "cuda" alone is asked for."""
    from diffpref.data.engine import own_device

    return own_device(device)
