"""What a check of a dataset can find: each kind with its severity, and the rows that it is found in.

A finding of severity "error" is a row that teaches nothing or cannot be read; too many of them fail the check. A
"warning" is a row that can be trained on but hardly should be. A "note" is worth knowing and often as it should be.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.facts import Facts
from diffpref.data.images import REASONS
from diffpref.data.parquet import opened
from diffpref.data.schema import COLUMNS
from diffpref.data.threads import groups

Severity = Literal["error", "warning", "note"]
Overlong = Callable[[list[str]], set[int]]  # the places of the prompts whose ends a text encoder does not read
DETAILS = 20  # rows of a finding whose details are told
AT_ONCE = 1000  # prompts given to a tokenizer
MISSPELT = 0.8  # similarity above which a column that is not known is taken for a misspelt one

_IMAGES: dict[str, str] = {
    "empty": "an image without bytes",
    "not_an_image": "an image in no format that is read",
    "too_large": "an image of more pixels than are decoded",
    "truncated": "an image that is cut short",
    "corrupt": "an image whose bytes are damaged",
    "unsupported_mode": "an image whose pixels have no meaning in RGB",
    "too_long": "a strip too narrow to be cropped to a square",
}
KINDS: dict[str, tuple[Severity, str]] = {
    **{f"image_{reason}": ("error", text) for reason, text in _IMAGES.items()},
    "same_image": ("error", "chosen and rejected are one file"),
    "contradicting_label": ("warning", "elsewhere the same images and prompt are judged the other way round"),
    "duplicate_pair": ("warning", "the same captions, images and winner as in an earlier row"),
    "duplicate_image": ("warning", "the same caption and image as in an earlier row"),
    "duplicate_id": ("warning", "the id of an earlier row"),
    "prompt_in_two_splits": ("warning", "the prompt stands in another split too"),
    "image_in_two_splits": ("warning", "an image stands in another split too"),
    "empty_prompt": ("warning", "no caption for an image: null, empty or blank"),
    "overlong_prompt": ("warning", "a caption whose end the text encoder does not read"),
    "blank_image": ("warning", "an image of one colour"),
    "only_ties": ("warning", "every row is a tie: no preference to train on"),
    "misspelt_column": ("warning", "a column that is not read, by its name probably a misspelt one"),
    "unknown_column": ("note", "a column that is not read"),
    "repeated_image": ("note", "an image stands in an earlier row too"),
    "image_of_two_prompts": ("note", "an image stands in an earlier row with another prompt"),
    "same_model": ("note", "one model drew both images"),
    "animated_image": ("note", "an animation, of which the first frame is used"),
}


@dataclass(frozen=True)
class Finding:
    """One kind of thing found in a split.

    ids: the rows' ids (or the columns' names) that it is found in. details: of the first of them, what is to be said
    of each beyond the kind's own text, such as the row that it repeats; "" where there is nothing. rows: their places
    in the split, empty where columns are meant.
    """

    kind: str
    split: str
    ids: list[str]
    details: list[str]
    rows: list[int]

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind][0]

    @property
    def text(self) -> str:
        """What the kind means, in a few words."""
        return KINDS[self.kind][1]


@dataclass(frozen=True, eq=False)
class Split:
    """A split with what its images are. pictures: (rows, sides) int64, the same number for the same file, -1 for none.

    prompts: (rows,) int64, the same number for the same prompt. Both are numbered over all splits.
    """

    dataset: PreferenceDataset
    facts: Facts
    pictures: np.ndarray
    prompts: np.ndarray

    @property
    def name(self) -> str:
        return self.dataset.split


def number_splits(parts: Sequence[tuple[PreferenceDataset, Facts]]) -> list[Split]:
    """The splits of a dataset with their images and prompts numbered."""
    every = np.concatenate([facts.images["sha256"].ravel() for _, facts in parts])
    numbers = np.unique(every, return_inverse=True)[1].reshape(-1)
    known: dict[str, int] = {}
    splits, start = [], 0
    for dataset, facts in parts:
        size = facts.images.size
        pictures = np.where(facts.decoded, numbers[start : start + size].reshape(facts.images.shape), -1)
        splits.append(Split(dataset, facts, pictures, _numbered(dataset.prompts, known)))
        start += size
    return splits


def find(split: Split, others: Sequence[Split], overlong: Overlong | None = None) -> list[Finding]:
    """All findings of a split.

    others: the other splits, to find leaks. overlong: tells the prompts that are too long for a text encoder.
    """
    found = {**_of_images(split), **_of_repeats(split), **_of_leaks(split, others), **_of_captions(split, overlong)}
    labels = split.dataset.labels
    if (labels == 0.5).all():
        found["only_ties"] = dict.fromkeys(range(len(labels)), "")
    return [*_of_columns(split), *(_of_rows(split, kind, rows) for kind, rows in found.items() if rows)]


def _of_rows(split: Split, kind: str, rows: dict[int, str]) -> Finding:
    ids = [split.dataset.ids[row] for row in rows]
    return Finding(kind, split.name, ids, list(rows.values())[:DETAILS], list(rows))


def _of_columns(split: Split) -> list[Finding]:
    """The columns that nobody reads, apart by whether they look like one that is missing."""
    strange, present = split.dataset.strange_columns(), set[str]()
    for shard in split.dataset.shards:
        with opened(shard.file) as file:
            present |= set(file.schema_arrow.names)
    missing = sorted(set(COLUMNS[split.dataset.kind]) - present)
    near = {name: difflib.get_close_matches(name, missing, 1, MISSPELT) for name in strange}
    misspelt = {name: f"did you mean {close[0]}?" for name, close in near.items() if close}
    unknown = {name: "" for name in strange if name not in misspelt}
    return [
        Finding(kind, split.name, list(columns), list(columns.values()), [])
        for kind, columns in (("misspelt_column", misspelt), ("unknown_column", unknown))
        if columns
    ]


def _of_images(split: Split) -> dict[str, dict[int, str]]:
    images, dataset = split.facts.images, split.dataset
    found = {f"image_{reason}": split.facts.broken.get(reason, {}) for reason in (*REASONS, "too_long")}
    if dataset.kind == "pairs":
        found["same_image"] = _plain((split.pictures[:, 0] == split.pictures[:, 1]) & (split.pictures[:, 0] >= 0))
        names = [dataset.texts.get(f"{side}_model") or [None] * len(dataset) for side in dataset.sides]
        if len({*names[0], *names[1]} - {None}) > 1:  # else the counts by model say it
            both = enumerate(zip(*names, strict=True))
            found["same_model"] = {row: str(one) for row, (one, two) in both if one and one == two}
    for kind, name in (("blank_image", "blank"), ("animated_image", "animated")):
        found[kind] = {row: _sides(dataset, images[row][name]) for row in np.flatnonzero(images[name].any(1)).tolist()}
    return found


def _sides(dataset: PreferenceDataset, which: np.ndarray) -> str:
    """Which of a pair's images are meant."""
    names = [side for side, meant in zip(dataset.sides, which, strict=True) if meant]
    return " and ".join(names) if dataset.kind == "pairs" else ""


def _of_repeats(split: Split) -> dict[str, dict[int, str]]:
    dataset, pictures, labels = split.dataset, split.pictures, split.dataset.labels
    whole = pictures.min(axis=1) >= 0
    captions = _captions(dataset)
    turned, tie = labels < 0.5, labels == 0.5
    if dataset.kind == "pairs":  # the likelier winner first; of a tie, whichever
        turned = turned | (tie & (pictures[:, 0] > pictures[:, 1]))
        order = np.where(turned[:, None], [[1, 0]], [[0, 1]])
        captions, ordered = (np.take_along_axis(part, order, 1) for part in (captions, pictures))
        judged, winners = whole & ~tie, ordered[:, 0]
    else:
        ordered, judged, winners = pictures, whole & ~tie & ~np.isnan(labels), (labels > 0.5).astype(np.int64)
    keys = np.column_stack([captions, ordered, tie] if dataset.kind == "pairs" else [captions, ordered])
    kind = f"duplicate_{dataset.kind.removesuffix('s')}"
    ids = _numbered(dataset.ids, {})[:, None]
    found = {
        kind: _repeats(split, keys, whole),
        "duplicate_id": {row: f"as row {first}" for row, first in _earlier(ids).items()},
    }
    together = np.column_stack([split.prompts, np.sort(pictures, 1)])
    found["contradicting_label"] = _contradictions(split, together, winners, judged)
    return found | _repeated_images(split, found[kind])


def _repeats(split: Split, keys: np.ndarray, which: np.ndarray) -> dict[int, str]:
    """Of the rows that count, those whose key (rows, parts) stood in an earlier one."""
    places = np.flatnonzero(which)
    pairs = _earlier(keys[places]).items()
    return {int(places[row]): f"as {split.dataset.ids[places[first]]}" for row, first in pairs}


def _contradictions(split: Split, keys: np.ndarray, winners: np.ndarray, judged: np.ndarray) -> dict[int, str]:
    """The judged rows for whose key (rows, parts) there are two winners, each with a row that says otherwise."""
    places = np.flatnonzero(judged)
    _, group = _groups(keys[places])
    seen: dict[int, dict[int, int]] = {}  # of each group by winner its first row; only of groups with two winners
    count = int(group.max(initial=-1)) + 1
    least, most = np.full(count, np.iinfo(np.int64).max), np.full(count, -1)
    np.minimum.at(least, group, winners[places])
    np.maximum.at(most, group, winners[places])
    torn = np.flatnonzero(least[group] < most[group]).tolist()
    for place in torn:
        seen.setdefault(int(group[place]), {}).setdefault(int(winners[places[place]]), int(places[place]))
    found = {}
    for place in torn:
        row = int(places[place])
        other = next(first for winner, first in seen[int(group[place])].items() if winner != winners[row])
        found[row] = f"against {split.dataset.ids[other]}"
    return found


def _repeated_images(split: Split, duplicates: dict[int, str]) -> dict[str, dict[int, str]]:
    """Rows with an image of an earlier row; what is a duplicate as a whole is not told again."""
    again: dict[str, dict[int, str]] = {"repeated_image": {}, "image_of_two_prompts": {}}
    sides = split.pictures.shape[1]
    flat, prompts = split.pictures.reshape(-1), np.repeat(split.prompts, sides)
    for place, first in _earlier(flat[:, None]).items():
        row, of = place // sides, first // sides
        if flat[place] >= 0 and row != of and row not in duplicates:
            kind = "repeated_image" if prompts[place] == prompts[first] else "image_of_two_prompts"
            again[kind].setdefault(row, f"as in {split.dataset.ids[of]}")
    return again


def _of_leaks(split: Split, others: Sequence[Split]) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {"prompt_in_two_splits": {}, "image_in_two_splits": {}}
    for other in others:
        pictures = other.pictures[other.pictures >= 0]
        for kind, leaking in (
            ("prompt_in_two_splits", np.isin(split.prompts, other.prompts)),
            ("image_in_two_splits", np.isin(split.pictures, pictures).any(1)),
        ):
            for row in np.flatnonzero(leaking).tolist():
                found[kind].setdefault(row, f"also in {other.name}")
    return {kind: dict(sorted(rows.items())) for kind, rows in found.items()}


def _of_captions(split: Split, overlong: Overlong | None) -> dict[str, dict[int, str]]:
    dataset = split.dataset
    too_long: set[str] = set()
    if overlong is not None:
        for group in groups(dataset.captions(), AT_ONCE):
            too_long |= {group[place] for place in overlong(group)}
    found: dict[str, dict[int, str]] = {"empty_prompt": {}, "overlong_prompt": {}}
    for row in range(len(dataset)):
        captions = [dataset.caption(row, side) for side in dataset.sides]
        if not all(caption.strip() for caption in captions):
            found["empty_prompt"][row] = ""
        if too_long and any(caption in too_long for caption in captions):
            found["overlong_prompt"][row] = ""
    return found


def _captions(dataset: PreferenceDataset) -> np.ndarray:
    """(rows, sides) int64: the same number for the same caption."""
    known: dict[str, int] = {}
    rows = range(len(dataset))
    return np.column_stack([_numbered((dataset.caption(row, side) for row in rows), known) for side in dataset.sides])


def _numbered(texts: Iterable[str], known: dict[str, int]) -> np.ndarray:
    return np.array([known.setdefault(text, len(known)) for text in texts], np.int64)


def _groups(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of equal rows of `keys` the first one's place (groups,), and which group each row belongs to (rows,)."""
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _earlier(keys: np.ndarray) -> dict[int, int]:
    """Of each row of `keys` that stood there before: the first row that is equal to it."""
    first, group = _groups(keys)
    firsts = first[group]
    return {int(row): int(firsts[row]) for row in np.flatnonzero(firsts != np.arange(len(keys)))}


def _plain(which: np.ndarray) -> dict[int, str]:
    return dict.fromkeys(np.flatnonzero(which).tolist(), "")
