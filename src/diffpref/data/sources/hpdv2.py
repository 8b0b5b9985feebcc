"""HPDv2: lists of images that people ranked, `train.json` and `test.json`, with the images in `train/` and `test/`.

An entry of the train list has two images (`file_path`) and `human_preference`, 1 for the better one; an entry of the
test list several (`image_path`) with their average `rank`, the lowest for the best, and the rank that each annotator
gave.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from diffpref.data.listed import entries, fault_of_prompt, image_file, list_file
from diffpref.data.schema import Dropped, Group
from diffpref.errors import UserError, nearest

KIND: Literal["groups"] = "groups"
LISTS = ("{split}.json", "{split}.jsonl")
FOLDERS = ("train", "test", "images")


def count(path: Path, split: str) -> int:
    """The number of entries. Raises UserError where the list is missing, broken, or of another form."""
    file = list_file(path, split, LISTS)
    total = 0
    for entry in entries(file):
        if not total:
            _check_keys(file, entry)
        total += 1
    return total


def read(path: Path, split: str) -> Iterator[Group | Dropped]:
    """Every entry as a ranked group, or why it is none. Raises UserError as `count`."""
    return read_from(path, split, 0)


def read_from(path: Path, split: str, start: int) -> Iterator[Group | Dropped]:
    """As `read`, without the first `start` entries, whose images are not read."""
    file = list_file(path, split, LISTS)
    for number, entry in enumerate(entries(file)):
        if number >= start:
            yield _group(file, number, entry)


def _group(file: Path, number: int, entry: dict[str, Any]) -> Group | Dropped:
    if reason := fault_of_prompt(entry.get("prompt")):
        return Dropped(file.name, number, reason)
    names = entry.get("file_path", entry.get("image_path"))
    scores = _scores(entry)
    if not isinstance(names, list) or len(names) < 2:
        return Dropped(file.name, number, "no_images", "fewer than two images")
    if scores is None or len(scores) != len(names):
        return Dropped(file.name, number, "no_ranking", f"{len(names)} images without a number each to rank them")
    ballots = [_scores(ballot) for ballot in entry.get("raw_annotations") or [] if isinstance(ballot, dict)]
    return Group(
        file.name,
        number,
        id=f"{file.stem}-{number}",
        prompt=entry["prompt"],
        images=tuple(image_file(file.parent, FOLDERS, name) for name in names),
        scores=scores,
        source="hpdv2",
        names=tuple(map(str, names)),
        ballots=tuple(ballot for ballot in ballots if ballot is not None and len(ballot) == len(names)),
    )


def _scores(entry: dict[str, Any]) -> tuple[float, ...] | None:
    """Higher is better: the preferences as they are, ranks turned round."""
    preferences = entry.get("human_preference")
    values = preferences if preferences is not None else entry.get("rank")
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        return None
    return tuple(float(value) if preferences is not None else -float(value) for value in values)


def _check_keys(file: Path, entry: dict[str, Any]) -> None:
    for alternatives in (("prompt",), ("file_path", "image_path"), ("human_preference", "rank")):
        if not any(key in entry for key in alternatives):
            raise UserError(f"{file}: entries have no {alternatives[0]!r} ({nearest(alternatives[0], entry)})")
