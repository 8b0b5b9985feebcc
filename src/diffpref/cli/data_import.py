"""`diffpref data import SOURCE INPUT OUTPUT`: a published dataset in the normal form."""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from diffpref.cli.parsing import parse
from diffpref.errors import UserError


@dataclass(frozen=True)
class ImportArguments:
    """Import a published dataset into the normal form. Killed, the same command goes on where it was."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """The dataset's kind: pickapic, pick-double-caption, hpdv2, hpdv2-benchmark, hpdv3, imagereward, rapidata, trl,
    diffengine, dro, folder or webdataset."""
    input: Annotated[Positional[str], arg(metavar="INPUT")]
    """Its file, the folder of its files, or a dataset id of the hub (owner/name or owner/name/folder)."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")]
    """The folder to write; it must be empty or absent."""
    split: str = "train"
    """The split to write, and the one to read where the input holds several."""
    splits: str | None = None
    """Several splits to write, by prompt: train=0.9,validation=0.05,test=0.05."""
    ties: Literal["keep", "soft", "drop", "random", "first"] | None = None
    """Keep ties with label 0.5 (the default, also called soft), drop them, decide each by a coin, or let the first
    image win."""
    rules: Literal["diffusion-dpo", "diffengine", "dcpo", "dro"] | None = None
    """Keep the rows that a published training script keeps."""
    generator: str | None = None
    """Only rows all of whose images' generators have this in their names."""
    min_agreement: float = 0.0
    """Only rows with at least this share of the annotators, or this confidence, behind the label."""
    min_side: int = 0
    """Only rows whose images have at least so many pixels on each side."""
    dedup: bool = False
    """Keep one of the rows with the same prompt and the same images, whoever won."""
    pairing: Literal["all", "best-worst", "adjacent"] | None = None
    """Which pairs a ranked group of images gives: all (the default), its best and worst, or neighbours."""
    min_margin: float = 0.0
    """Only pairs of a ranked group whose scores or ranks differ by at least this."""
    revision: str | None = None
    """Of a dataset id: the branch, tag or commit."""
    max_bad_share: float = 0.05
    """Stop when more than this share of the rows is bad."""
    shard_rows: int = 10_000
    """Rows of the source after which a shard ends at the latest; what a killed import has to read again."""
    columns: tuple[str, ...] = ()
    """Columns that have another name in the input, each as NAME=COLUMN: NAME is the one that the source asks for."""
    overwrite: bool = False
    """Replace the output where it is a dataset that diffpref wrote."""
    json: bool = False
    """Print the counts as JSON."""


def main(arguments: list[str]) -> None:
    """Import; the counts go to stdout."""
    given = parse(ImportArguments, arguments, "diffpref data import")
    from diffpref.data.import_options import ImportOptions
    from diffpref.data.importing import import_source
    from diffpref.data.splitting import read_shares

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken metadata beside good pixels
    named = {name: value for name, value in vars(given).items() if name not in ("source", "input", "output", "json")}
    named["splits"] = read_shares(given.splits) if given.splits is not None else {}
    named["columns"] = _named_columns(given.columns)
    options = ImportOptions(**named)
    summary = import_source(given.source, given.input, given.output, options)
    if given.json:
        print(json.dumps(asdict(summary), indent=2))
        return
    print(f"{given.output}: kept {summary.kept} of {summary.read} rows, {summary.ties} ties ({options.what_of_ties})")
    for split, count in summary.splits.items():
        print(f"  split {count:>10}  {split}")
    for reason, count in summary.dropped.items():
        print(f"  dropped {count:>8}  {reason}")


def _named_columns(given: tuple[str, ...]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for each in given:
        name, sign, column = each.partition("=")
        if not (name and sign and column):
            raise UserError(f"--columns: {each!r} is not NAME=COLUMN")
        if name in columns:
            raise UserError(f"--columns: {name} is named twice")
        columns[name] = column
    return columns
