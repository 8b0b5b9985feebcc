"""How to import: the options, what they may be together, and the rules of the published training scripts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from diffpref.data.pairing import Pairing
from diffpref.data.splitting import SPLIT_NAME, check_shares
from diffpref.errors import UserError

Ties = Literal["keep", "soft", "drop", "random", "first"]
Rules = Literal["diffusion-dpo", "diffengine", "dcpo", "dro"]

# What becomes of ties there. DRO asks nobody's opinion: it takes every image once with a prompt.
TIES_OF_RULES: dict[Rules, Ties] = {"diffusion-dpo": "drop", "diffengine": "first", "dcpo": "first", "dro": "keep"}


@dataclass(frozen=True)
class ImportOptions:
    """How to import; the command's help says what each option does.

    ties: None for what `rules` say, and "keep" without rules. splits: the share of each split by name; empty for the
    one split `split`. shard_rows: rows of the source after which shards end at the latest, and a killed import has
    lost nothing of what came before. columns: the input's columns for columns that the source asks for, where they
    have another name.
    """

    split: str = "train"
    ties: Ties | None = None
    max_bad_share: float = 0.05
    overwrite: bool = False
    rules: Rules | None = None
    generator: str | None = None
    min_agreement: float = 0.0
    min_side: int = 0
    dedup: bool = False
    splits: dict[str, float] = field(default_factory=dict)
    pairing: Pairing | None = None
    min_margin: float = 0.0
    revision: str | None = None
    shard_rows: int = 10_000
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def what_of_ties(self) -> Ties:
        """What becomes of ties: `keep`, `drop`, `random` or `first`."""
        ties = TIES_OF_RULES[self.rules] if self.rules else self.ties or "keep"
        return "keep" if ties == "soft" else ties

    @property
    def unique(self) -> bool:
        """Whether duplicates are left out."""
        return self.dedup or self.rules == "dro"

    def check(self) -> None:
        """Raises UserError for values that will not do."""
        for name in (self.split, *self.splits):
            if not re.fullmatch(SPLIT_NAME, name):
                raise UserError(f"{name!r} is no name for a split: letters, digits and underscores only")
        if self.rules and self.ties:
            raise UserError(f"--ties {self.ties}: --rules {self.rules} already says what becomes of ties")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"the share of bad rows must lie between 0 and 1, not {self.max_bad_share:g}")
        if not 0 <= self.min_agreement <= 1:
            raise UserError(f"--min-agreement must lie between 0 and 1, not {self.min_agreement:g}")
        if self.min_side < 0:
            raise UserError(f"--min-side: {self.min_side} is below 0")
        if not self.min_margin >= 0:
            raise UserError(f"--min-margin: {self.min_margin:g} is below 0")
        if self.shard_rows < 1:
            raise UserError(f"--shard-rows: {self.shard_rows} is not above 0")
        check_shares(self.splits)

    def record(self) -> dict[str, str | float]:
        """What `dataset.json` says of the options: of ties, of the share of bad rows, and of what else is set."""
        given: dict[str, str | float] = {"ties": self.what_of_ties, "max_bad_share": self.max_bad_share}
        if self.splits:
            given["splits"] = ",".join(f"{name}={share:g}" for name, share in self.splits.items())
        for name in ("rules", "generator", "min_agreement", "min_side", "dedup", "pairing", "min_margin"):
            if value := getattr(self, name):
                given[name] = value
        if self.columns:
            given["columns"] = " ".join(f"{name}={column}" for name, column in self.columns.items())
        if self.shard_rows != ImportOptions.shard_rows:
            given["shard_rows"] = self.shard_rows
        return given
