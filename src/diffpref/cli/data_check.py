"""`diffpref data check DATASET`: every row and every image looked at, as a table, as JSON and as a page."""

import json
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from diffpref.cli.parsing import parse
from diffpref.errors import UserError

if TYPE_CHECKING:
    from diffpref.data.check import CheckReport, SplitReport
    from diffpref.data.findings import Finding

IDS_SHOWN = 3  # of a finding, in the table; the JSON has all
MODELS_SHOWN = 8


@dataclass(frozen=True)
class Options:
    """Look at every row and every image of a dataset in the normal form, and tell what is wrong or odd about it."""

    dataset: Annotated[Positional[Path], arg(metavar="DATASET")]
    """The dataset's folder, or one parquet file."""
    html: Annotated[Path | None, arg(metavar="PAGE.html")] = None
    """Write a page with counts, charts and example images."""
    model: str | None = None
    """Find prompts too long for this model: a pipeline's folder or hub id, `embedded`, or a tokenizer's folder."""
    max_tokens: int | None = None
    """How many tokens it reads of a prompt; its tokenizer's own limit when not given (77 for CLIP)."""
    max_bad_share: float = 0.05
    """Fail when more than this share of a split's rows has an error."""
    json: bool = False
    """Print everything as JSON, with the ids of all rows."""


def main(arguments: list[str]) -> None:
    """Run the command; the findings go to stdout, and too many errors are a UserError."""
    options = parse(Options, arguments, "diffpref data check")
    _refuse(options)
    from diffpref.data.check import check, refuse_bad

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken metadata in images that it reads well
    overlong = None
    if options.model is not None:
        from diffpref.models.tokenizers import overlong_for

        overlong = overlong_for(options.model, options.max_tokens)
    report = check(options.dataset, overlong, options.model)
    page = {} if options.html is None else {"page": str(options.html)}
    print(json.dumps(report.as_dict() | page, indent=2) if options.json else describe(report), flush=True)
    if options.html is not None:
        from diffpref.report.data import write_check

        write_check(options.html, report, [f"diffpref data check {shlex.join(arguments)}"])
        if not options.json:
            print(f"\npage: {options.html}")
    refuse_bad(report, options.max_bad_share)


def _refuse(options: Options) -> None:
    """Raise UserError for what would only fail after the work."""
    if options.html is not None and options.html.is_dir():
        raise UserError(f"--html: {options.html} is a folder; name a file")
    if not 0 <= options.max_bad_share <= 1:
        raise UserError(f"--max-bad-share must lie between 0 and 1, not {options.max_bad_share:g}")
    if options.max_tokens is not None and options.model is None:
        raise UserError("--max-tokens needs --model: tokens are counted by a model's tokenizer")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UserError(f"--max-tokens must be at least 1, not {options.max_tokens}")


def describe(report: "CheckReport") -> str:
    """The report as a text of a screen or two."""
    parts = ["\n".join(_split(name, split)) for name, split in report.splits.items()]
    if report.findings:
        widths = [max(len(part) for part in parts) for parts in zip(*map(_head, report.findings), strict=True)]
        parts.append("\n".join(_line(finding, widths) for finding in report.findings))
    else:
        parts.append("nothing found")
    if report.tokenizer is None:
        parts.append("Prompt lengths in tokens were not measured: --model MODEL does.")
    return "\n\n".join(parts)


def _head(finding: "Finding") -> tuple[str, str, str, str]:
    """What stands below one another in the table."""
    return finding.severity, finding.split, finding.kind, f"{len(finding.ids):,}"


def _line(finding: "Finding", widths: list[int]) -> str:
    """A finding with what it means and where it stands first."""
    *names, number = _head(finding)
    start = "  ".join(f"{name:<{width}}" for name, width in zip(names, widths, strict=False))
    shown = zip(finding.ids[:IDS_SHOWN], finding.details, strict=False)
    ids = ", ".join(_plain(name) + (f" ({_plain(detail)})" if detail else "") for name, detail in shown)
    more = ", ..." if len(finding.ids) > IDS_SHOWN else ""
    return f"{start}  {number:>{widths[-1]}}  {finding.text}: {ids}{more}"


def _split(name: str, split: "SplitReport") -> list[str]:
    """A split's numbers in a few lines."""
    facts = {
        "labels": _counts(split.labels),
        "images": f"{split.images:,}, {split.distinct:,} different; {_counts(split.formats)}",
        "sizes": _counts(split.sizes),
        "captions": f"{split.captions:,} different; the longest has {split.longest:,} characters",
        "words": _counts(split.words),
    }
    if split.models:
        shown = list(split.models.items())[:MODELS_SHOWN]
        told = [
            f"{_plain(model)} {count.images:,}" + (f" (won {count.wins:,}, lost {count.losses:,})" if judged else "")
            for model, count in shown
            for judged in (count.wins + count.losses,)
        ]
        facts["models"] = ", ".join(told) + (", ..." if len(split.models) > len(shown) else "")
    lines = [f"{name}: {split.rows:,} {split.kind}, {split.bad:,} with an error"]
    return lines + [f"  {key:<10}{value}" for key, value in facts.items() if value]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{_plain(name)} {count:,}" for name, count in counts.items() if count)


def _plain(text: str) -> str:
    """A text of the data with nothing in it that a terminal would obey."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
