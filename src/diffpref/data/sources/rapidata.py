"""Rapidata's sets: two images, the models that drew them, and what share of the people preferred each.

The shares are votes (`votes_image1`, `votes_image2`) or weighted votes for one of three questions
(`weighted_results_image1_preference`, `..._alignment`, `..._coherence`); a set has one of these or several. The first
that a file has, in the order of VOTES, decides; `--columns` puts another in its place. The image with the larger share
becomes `chosen`, its share the label, the difference of the shares the margin.
"""

from collections.abc import Iterator
from pathlib import Path

from diffpref.data import tables
from diffpref.data.fields import BadRow, Columns, Record, number, text
from diffpref.data.schema import Dropped, Found, Kind, PairRow
from diffpref.errors import UserError, nearest

KIND: Kind = "pairs"
SHARDS = (".parquet", ".tar")
VOTES = (
    "weighted_results_image{}_preference",
    "votes_image{}",
    "weighted_results_image{}_alignment",
    "weighted_results_image{}_coherence",
)
COLUMNS = Columns(
    {"prompt": "text", "image1": "image", "image2": "image"},
    {
        **dict.fromkeys((name.format(side) for name in VOTES for side in (1, 2)), "number"),
        **dict.fromkeys(("model1", "model2", "image1_path", "image2_path"), "name"),
    },
)


def count(path: Path, split: str, names: tables.Names | None = None) -> int:
    """The number of rows. Raises UserError where a file is broken or lacks a column."""
    for file in tables.files(path, split):
        found = tables.columns(file)
        if found is not None and not _votes({**found, **(names or {})}):
            raise UserError(f"{file} has no columns of votes ({nearest('votes_image1', found)})")
    return tables.count(path, split, COLUMNS, names)


def read(path: Path, split: str, names: tables.Names | None = None) -> Iterator[Found | Dropped]:
    """Every row as a pair, the likelier winner first, or why it is none. Raises UserError as `count`."""
    return tables.read(path, split, COLUMNS, _pair, names)


def _pair(record: Record, name: str) -> Found:
    prompt, share = text(record, "prompt"), _share(record)
    chosen, rejected = (1, 2) if share >= 0.5 else (2, 1)
    share = max(share, 1 - share)
    pair = PairRow(
        id=name,
        prompt=prompt,
        chosen=record[f"image{chosen}"] or b"",
        rejected=record[f"image{rejected}"] or b"",
        label=share,
        margin=2 * share - 1,
        chosen_id=record.get(f"image{chosen}_path"),
        rejected_id=record.get(f"image{rejected}_path"),
        chosen_model=record.get(f"model{chosen}"),
        rejected_model=record.get(f"model{rejected}"),
        source="rapidata",
    )
    return Found("", 0, pair, agreement=share)  # its place is filled in by who reads


def _share(record: Record) -> float:
    """The first image's share of the votes."""
    for first, second in _votes(record):
        ours, others = number(record, first, 0), number(record, second, 0)
        if ours is None or others is None:
            raise BadRow("null_votes", first if ours is None else second)
        if not ours + others:
            raise BadRow("no_votes", f"{first} and {second} are 0", bad=False)
        return ours / (ours + others)
    raise BadRow("null_votes")


def _votes(columns: Record) -> list[tuple[str, str]]:
    """The pairs of columns of votes that are there, the deciding one first."""
    pairs = [(name.format(1), name.format(2)) for name in VOTES]
    return [pair for pair in pairs if pair[0] in columns and pair[1] in columns]
