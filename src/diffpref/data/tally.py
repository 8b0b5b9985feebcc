"""Count the rows of an import by what becomes of them, and stop it when too many are bad."""

from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from diffpref.data.schema import NAMED_ROWS, Dropped, Found
from diffpref.errors import UserError

NAMED_GENERATORS = 50  # that a message chooses the nearest of


@dataclass
class Tally:
    """The counts of an import. `total` is the number of rows that will be read, None where nobody knows it yet.

    judged: rows read, without those that were left out before anybody looked at their images.
    """

    max_bad_share: float
    total: int | None = None
    read: int = 0
    judged: int = 0
    kept: int = 0
    ties: int = 0
    bad: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    named: list[Dropped] = field(default_factory=list)
    bad_reasons: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    generators: list[str] = field(default_factory=list)  # a few of those that were left out

    def count(self, row: Found | Dropped, judged: bool = True) -> None:
        """Count a row. Raises UserError as soon as it is certain that too many are bad."""
        self.read += 1
        self.judged += judged
        if isinstance(row, Found):
            self.kept += 1
            return
        self.dropped[row.reason] += 1
        if row.reason == "other_generator" and len(self.generators) < NAMED_GENERATORS:
            self.generators += [name for name in row.detail.splitlines() if name not in self.generators]
        if row.bad:
            self.bad += 1
            self.bad_reasons[row.reason] += 1
            if len(self.named) < NAMED_ROWS:
                self.named.append(row)
            if self.total is not None:
                self._stop_if_too_many(self.total)  # even if all that follow are good

    def finish(self, input: str, noun: str) -> None:
        """Judge the whole. Raises UserError where too many judged rows are bad or no row is left."""
        if not self.read:
            raise UserError(f"{input} is empty: it holds no rows")
        self._stop_if_too_many(self.judged)
        if not self.kept:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
            raise UserError(f"no {noun} of {input} is left; of {self.read} rows were dropped: {reasons}")

    def record(self) -> dict[str, Any]:
        """All counts as JSON can hold them."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return given | {"named": [asdict(each) for each in self.named]}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Tally":
        """The tally that `record` was made of."""
        given = {each.name: record[each.name] for each in fields(cls)}
        for name in ("dropped", "bad_reasons", "splits"):
            given[name] = Counter(given[name])
        given["named"] = [Dropped(**each) for each in given["named"]]
        return cls(**given)

    def _stop_if_too_many(self, rows: int) -> None:
        if not self.bad or self.bad / rows <= self.max_bad_share:
            return
        (reason, count), *_ = self.bad_reasons.most_common(1)
        raise UserError(
            f"more than {self.max_bad_share:.3g} of {rows} rows are bad: {self.bad} after reading {self.read}, "
            f"most often {reason} ({count}); the first: {self.named[0]}"
        )
