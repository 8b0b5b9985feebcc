"""Check a dataset in the normal form: every image decoded, every row looked at, every finding by its row's id."""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffpref.data.dataset import PreferenceDataset, split_names
from diffpref.data.facts import gather
from diffpref.data.findings import KINDS, Finding, Overlong, Split, find, number_splits
from diffpref.data.schema import DATASET_FILE, FORMATS, Kind, read_dataset_file
from diffpref.errors import UserError
from diffpref.progress import Bar

MOST_SIZES = 8  # different sizes that are counted apart
WORDS = (0, 5, 10, 20, 40, 80)  # the last number of words of each class of prompts; longer ones are the last class


@dataclass(frozen=True)
class ModelCount:
    """What one model drew: its images in all rows, and of those in pairs with a winner how many won and lost."""

    images: int
    wins: int
    losses: int


@dataclass(frozen=True)
class SplitReport:
    """One split in numbers.

    bad: rows with at least one finding of severity error. labels: of pairs `chosen` (better), `rejected`, `ties`; of
    single images `liked`, `disliked`, `ties`, `unlabelled`; and in both `soft`, those of them that are neither 0, 0.5
    nor 1. images: how many there are; distinct: how many different files. sizes: by `width x height`, the most frequent
    ones and `other`. words: how many different captions have how many words. longest: characters of the longest one.
    """

    kind: Kind
    rows: int
    bad: int
    labels: dict[str, int]
    images: int
    distinct: int
    formats: dict[str, int]
    sizes: dict[str, int]
    captions: int
    words: dict[str, int]
    longest: int
    models: dict[str, ModelCount]


@dataclass(frozen=True)
class CheckReport:
    """What a check found, errors first. tokenizer: by what prompts were measured; None where they were not."""

    path: str
    splits: dict[str, SplitReport]
    findings: list[Finding]
    tokenizer: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values, with the ids of all rows."""
        found = [
            {"severity": finding.severity} | {name: value for name, value in asdict(finding).items() if name != "rows"}
            for finding in self.findings
        ]
        return asdict(self) | {"findings": found}


def check(path: Path, overlong: Overlong | None = None, tokenizer: str | None = None) -> CheckReport:
    """Look at every row and every image of every split; `findings.KINDS` lists what can be found.

    overlong tells which prompts are too long for a text encoder, and `tokenizer` says by what. Raises UserError where
    the dataset cannot be opened or is not what its dataset.json tells.
    """
    path = Path(path)
    datasets = {split: PreferenceDataset.open(path, split) for split in split_names(path)}
    _check_description(path, datasets)
    with Bar("check", sum(map(len, datasets.values())), "rows") as bar:
        splits = number_splits([(dataset, gather(dataset, bar)) for dataset in datasets.values()])
    reports, findings = {}, []
    for split in splits:
        found = find(split, [other for other in splits if other is not split], overlong)
        reports[split.name] = _report(split, found)
        findings += found
    findings.sort(key=lambda finding: list(KINDS).index(finding.kind))
    return CheckReport(str(path), reports, findings, tokenizer)


def refuse_bad(report: CheckReport, max_bad_share: float) -> None:
    """Raise UserError where more than this share of a split's rows has an error."""
    for name, split in report.splits.items():
        if split.bad > max_bad_share * split.rows:
            counts = Counter({f.kind: len(f.ids) for f in report.findings if f.split == name and f.severity == "error"})
            (kind, count), *_ = counts.most_common(1)
            raise UserError(
                f"{report.path}: {split.bad} of {split.rows} rows of split {name!r} cannot be trained on "
                f"({split.bad / split.rows:.3g}, at most {max_bad_share:g}); most often {kind} ({count})"
            )


def _check_description(path: Path, datasets: dict[str, PreferenceDataset]) -> None:
    """Raise UserError where dataset.json tells of another split or another kind of rows."""
    described = read_dataset_file(path) if path.is_dir() else None
    if described is None:
        return
    there = ", ".join(datasets)
    for told in described.get("splits") or [described.get("split")]:
        if told not in datasets:
            raise UserError(f"{path}: its {DATASET_FILE} tells of the split {told!r}, but the files are of {there}")
        kind = datasets[told].kind
        if described["format"] != FORMATS[kind]:
            raise UserError(f"{path} holds {kind}, but its {DATASET_FILE} tells {described['format']}")


def _report(split: Split, findings: Iterable[Finding]) -> SplitReport:
    dataset, images, decoded = split.dataset, split.facts.images, split.facts.decoded
    bad = {row for finding in findings if finding.severity == "error" for row in finding.rows}
    texts = list(dataset.captions())
    formats, counts = np.unique(images["format"][decoded], return_counts=True)
    return SplitReport(
        kind=dataset.kind,
        rows=len(dataset),
        bad=len(bad),
        labels=_labels(dataset),
        images=images.size,
        distinct=len(np.unique(split.pictures[decoded])),
        formats={kind.decode(): int(count) for kind, count in zip(formats, counts, strict=True)},
        sizes=_sizes(images[decoded]),
        captions=len(texts),
        words=_words(texts),
        longest=max(map(len, texts)),
        models=_models(dataset),
    )


def _labels(dataset: PreferenceDataset) -> dict[str, int]:
    labels = dataset.labels
    parts = {"ties": labels == 0.5, "soft": np.isfinite(labels) & ~np.isin(labels, (0.0, 0.5, 1.0))}
    if dataset.kind == "pairs":
        parts = {"chosen": labels > 0.5, "rejected": labels < 0.5, **parts}
    else:
        parts = {"liked": labels > 0.5, "disliked": labels < 0.5, **parts, "unlabelled": np.isnan(labels)}
    return {name: int(which.sum()) for name, which in parts.items()}


def _sizes(images: np.ndarray) -> dict[str, int]:
    sides, counts = np.unique(np.column_stack([images["width"], images["height"]]), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shown = {f"{sides[place][0]} x {sides[place][1]}": int(counts[place]) for place in order[:MOST_SIZES]}
    others = int(counts[order[MOST_SIZES:]].sum())
    return shown | ({"other": others} if others else {})


def _words(texts: list[str]) -> dict[str, int]:
    """How many texts have 0, 1 to 5, 6 to 10, ... words."""
    classes = np.searchsorted(WORDS, [len(text.split()) for text in texts])
    counts = np.bincount(classes, minlength=len(WORDS) + 1).tolist()
    names = ["0", *(f"{low + 1}-{high}" for low, high in itertools.pairwise(WORDS)), f"over {WORDS[-1]}"]
    return dict(zip(names, counts, strict=True))


def _models(dataset: PreferenceDataset) -> dict[str, ModelCount]:
    """Of each model that the rows name, most images first."""
    images, wins, losses = Counter[str](), Counter[str](), Counter[str]()
    better = {"chosen": dataset.labels > 0.5, "rejected": dataset.labels < 0.5}
    for side in dataset.sides:
        for row, model in enumerate(dataset.texts.get(f"{side}_model") or []):
            if not model:
                continue
            images[model] += 1
            if dataset.kind == "pairs" and dataset.labels[row] != 0.5:
                (wins if better[side][row] else losses)[model] += 1
    return {model: ModelCount(count, wins[model], losses[model]) for model, count in images.most_common()}
