"""`diffpref data export FORMAT DATASET OUTPUT`: a dataset in the form of another tool."""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from diffpref.cli.parsing import parse
from diffpref.errors import UserError


@dataclass(frozen=True)
class Options:
    """Write a dataset in the form of another tool, with the images' original bytes."""

    format: Annotated[Positional[Literal["trl", "folder", "webdataset"]], arg(metavar="FORMAT")]
    """trl: parquet with prompt, chosen and rejected. folder: image files and metadata.jsonl. webdataset: tar files."""
    dataset: Annotated[Positional[Path], arg(metavar="DATASET")]
    """A dataset in the normal form, of pairs or single images."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    split: str = "train"
    """The split to read."""
    shard_mb: float | None = None
    """Megabytes of images in a file of trl or webdataset, 256 when not given."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


def main(arguments: list[str]) -> None:
    """Write the export; the counts go to stdout."""
    given = parse(Options, arguments, "diffpref data export")
    if given.shard_mb is not None and given.format == "folder":
        raise UserError("--shard-mb: a folder of image files has no shards")
    if given.shard_mb is not None and not 0 < given.shard_mb < 1e6:
        raise UserError(f"--shard-mb: {given.shard_mb:g} is not between 0 and a million")

    from diffpref.data.dataset import PreferenceDataset
    from diffpref.data.exporting import export_dataset

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken metadata beside good pixels
    size = int((given.shard_mb or 256) * 2**20)
    dataset = PreferenceDataset.open(given.dataset, given.split)
    summary = export_dataset(dataset, given.output, given.format, size, given.overwrite)
    if given.json:
        print(json.dumps(asdict(summary), indent=2))
        return
    print(f"{given.output}: {summary.kept} {dataset.kind} of {summary.read}")
    for reason, count in summary.dropped.items():
        print(f"  dropped {count:>8}  {reason}")
