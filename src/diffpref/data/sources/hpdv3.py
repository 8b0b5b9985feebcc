"""HPDv3: a list of pairs, `path1` always the preferred image, with the images beside it.

`confidence`, the probability that `path1` is better, and `choice_dist`, how many annotators chose either image, are
there for some pairs. They are the row's agreement, the first where both are there; the label stays 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffpref.data.listed import entries, fault_of_prompt, image_file, list_file
from diffpref.data.schema import Dropped, Found, Kind, PairRow
from diffpref.errors import UserError, nearest

KIND: Kind = "pairs"
LISTS = ("{split}.json", "{split}.jsonl")
FOLDERS = ("images",)
REQUIRED = ("prompt", "path1", "path2")


def count(path: Path, split: str) -> int:
    """The number of entries. Raises UserError where the list is missing, broken, or of another form."""
    file = list_file(path, split, LISTS)
    total = 0
    for entry in entries(file):
        for key in REQUIRED:
            if not total and key not in entry:
                raise UserError(f"{file}: entries have no {key!r} ({nearest(key, entry)})")
        total += 1
    return total


def read(path: Path, split: str) -> Iterator[Found | Dropped]:
    """Every entry as a pair, or why it is none. Raises UserError as `count`."""
    return read_from(path, split, 0)


def read_from(path: Path, split: str, start: int) -> Iterator[Found | Dropped]:
    """As `read`, without the first `start` entries, whose images are not read."""
    file = list_file(path, split, LISTS)
    for number, entry in enumerate(entries(file)):
        if number >= start:
            yield _pair(file, number, entry)


def _pair(file: Path, number: int, entry: dict[str, Any]) -> Found | Dropped:
    if reason := fault_of_prompt(entry.get("prompt")):
        return Dropped(file.name, number, reason)
    chosen, rejected = entry.get("path1"), entry.get("path2")
    if not chosen or not rejected:
        return Dropped(file.name, number, "no_images", "path1 or path2 is missing")
    pair = PairRow(
        id=f"{file.stem}-{number}",
        prompt=entry["prompt"],
        chosen=image_file(file.parent, FOLDERS, chosen),
        rejected=image_file(file.parent, FOLDERS, rejected),
        chosen_id=str(chosen),
        rejected_id=str(rejected),
        chosen_model=_text(entry.get("model1")),
        rejected_model=_text(entry.get("model2")),
        source="hpdv3",
    )
    return Found(file.name, number, pair, _agreement(entry))


def _agreement(entry: dict[str, Any]) -> float | None:
    confidence, votes = entry.get("confidence"), entry.get("choice_dist")
    if isinstance(confidence, int | float):
        return float(confidence)
    if isinstance(votes, list) and len(votes) == 2 and all(isinstance(each, int | float) for each in votes):
        return max(votes) / sum(votes) if sum(votes) > 0 else None
    return None


def _text(value: object) -> str | None:
    return None if value is None else str(value)
