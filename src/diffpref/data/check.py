"""Check a dataset in the normal form: every image decoded, every row looked at, every finding by its row's id."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from diffpref.data import images
from diffpref.data.dataset import SIDES, PairDataset, split_names
from diffpref.data.threads import map_in_order
from diffpref.errors import UserError
from diffpref.progress import Bar

IDS_SHOWN = 3  # of a problem, in the table; the JSON has all


@dataclass(frozen=True)
class SplitReport:
    """One split: how its labels lie (`chosen` better, `ties`, `rejected` better), and row ids by problem."""

    pairs: int
    chosen: int
    ties: int
    rejected: int
    bad: int  # rows with at least one problem
    problems: dict[str, list[str]]


@dataclass(frozen=True)
class CheckReport:
    """What a check found, by split."""

    path: str
    splits: dict[str, SplitReport]

    @property
    def bad_share(self) -> float:
        """The share of all rows that have at least one problem."""
        return sum(split.bad for split in self.splits.values()) / sum(split.pairs for split in self.splits.values())

    def as_dict(self) -> dict:
        """The report as JSON-ready values."""
        return asdict(self) | {"bad_share": self.bad_share}


def check(path: Path) -> CheckReport:
    """Look at every row of every split. Raises UserError where the dataset cannot be opened at all.

    Problems of a row: `image_<reason>`, `same_image` (chosen and rejected are one), `duplicate_pair` (prompts and both
    images as in an earlier row), `duplicate_id`, `empty_prompt`, `prompt_in_two_splits`.
    """
    datasets = {split: PairDataset.open(path, split) for split in split_names(path)}
    prompts = {split: set(dataset.prompts) for split, dataset in datasets.items()}
    reports = {}
    with Bar("check", sum(map(len, datasets.values())), "pairs") as bar:
        for split, dataset in datasets.items():
            elsewhere = set().union(*(seen for other, seen in prompts.items() if other != split))
            reports[split] = _check_split(dataset, elsewhere, bar)
    return CheckReport(str(path), reports)


def refuse_bad(report: CheckReport, max_bad_share: float) -> None:
    """Raise UserError where more than this share of the rows has a problem; only warn where all pairs are ties."""
    if report.bad_share > max_bad_share:
        bad = sum(split.bad for split in report.splits.values())
        raise UserError(
            f"{report.path}: {bad} rows have problems, {report.bad_share:.3g} of all: at most {max_bad_share:g}"
        )
    for name, split in report.splits.items():
        if split.ties == split.pairs:
            print(
                f"diffpref: warning: every pair of split {name!r} is a tie: no preference to train on", file=sys.stderr
            )


def table(report: CheckReport) -> str:
    """The report as a short text."""
    lines = [f"{'split':<16}{'pairs':>9}{'chosen':>9}{'ties':>9}{'rejected':>9}{'bad':>9}"]
    for name, split in report.splits.items():
        lines.append(f"{name:<16}{split.pairs:>9}{split.chosen:>9}{split.ties:>9}{split.rejected:>9}{split.bad:>9}")
    found = [(name, problem, ids) for name, split in report.splits.items() for problem, ids in split.problems.items()]
    if not found:
        return "\n".join([*lines, "", "no problems"])
    lines += ["", f"{'split':<16}{'problem':<28}{'rows':>6}  first ids"]
    for name, problem, ids in found:
        more = ", ..." if len(ids) > IDS_SHOWN else ""
        lines.append(f"{name:<16}{problem:<28}{len(ids):>6}  {', '.join(ids[:IDS_SHOWN])}{more}")
    return "\n".join(lines)


def _check_split(dataset: PairDataset, elsewhere: set[str], bar: Bar) -> SplitReport:
    problems: dict[str, list[str]] = {}
    bad = 0
    ids: set[str] = set()
    pairs: set[bytes] = set()
    for row, faults, digest in map_in_order(_check_images, _pairs(dataset)):
        key = hashlib.sha256(
            repr((dataset.chosen_prompts[row], dataset.rejected_prompts[row])).encode() + digest
        ).digest()
        faults = {
            **faults,
            "duplicate_pair": key in pairs,
            "duplicate_id": dataset.ids[row] in ids,
            "empty_prompt": not (dataset.chosen_prompts[row].strip() and dataset.rejected_prompts[row].strip()),
            "prompt_in_two_splits": dataset.prompts[row] in elsewhere,
        }
        pairs.add(key)
        ids.add(dataset.ids[row])
        bad += any(faults.values())
        for problem in (name for name, present in faults.items() if present):
            problems.setdefault(problem, []).append(dataset.ids[row])
        bar.advance()
    return SplitReport(
        pairs=len(dataset),
        chosen=int((dataset.labels > 0.5).sum()),
        ties=int((dataset.labels == 0.5).sum()),
        rejected=int((dataset.labels < 0.5).sum()),
        bad=bad,
        problems=problems,
    )


def _pairs(dataset: PairDataset) -> Iterator[tuple[int, bytes, bytes]]:
    """(row, chosen, rejected): `iter_images` gives the chosen image of a row and then its rejected one."""
    stream = dataset.iter_images()
    for (row, _, chosen), (_, _, rejected) in zip(stream, stream, strict=True):
        yield row, chosen, rejected


def _check_images(pair: tuple[int, bytes, bytes]) -> tuple[int, dict[str, bool], bytes]:
    """(row, what is wrong with its images, a digest of both): the part of the work that threads share."""
    row, *both = pair
    faults = {"same_image": both[0] == both[1]}
    for _, data in zip(SIDES, both, strict=True):
        try:
            images.decode(data)
        except images.BadImage as error:
            faults[f"image_{error.reason}"] = True
    return row, faults, b"".join(hashlib.sha256(data).digest() for data in both)
