"""`diffpref data caption | perturb`: the texts of images that DCPO trains on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from diffpref.captioners.base import CaptionOptions
from diffpref.perturbers.base import PerturbOptions


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
    split: str = "train"
    """The split to read."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


@dataclass(frozen=True)
class PerturbArguments:
    """Change the text of every pair's rejected image, so that it fits worse (DCPO-p and DCPO-h)."""

    dataset: Annotated[Positional[Path], arg(metavar="DATASET")]
    """A dataset of pairs in the normal form."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    mode: Literal["p", "h"] = "p"
    """The paper's modes. p: the better image keeps the prompt, the other one gets the prompt perturbed. h: both keep
    the captions that `data caption` wrote, the other one's is perturbed."""
    tool: OmitArgPrefixes[PerturbOptions] = field(default_factory=PerturbOptions)
    config: Path | None = None
    """A YAML file of the tool's options, perturber and template among them; the command line goes before it."""
    split: str = "train"
    """The split to read."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""
