"""The page of a check of a dataset: what it holds in numbers, what was found, and the rows that it was found in."""

import html
from pathlib import Path

import numpy as np

from diffpref.data.check import CheckReport, SplitReport
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.findings import Finding
from diffpref.data.images import BadImage, decode
from diffpref.files import write_whole
from diffpref.report.charts import bar_chart
from diffpref.report.parts import count, document, section, tile
from diffpref.report.pictures import card, picture

EXAMPLES = 4  # rows shown of each finding
DRAWN = 8  # rows shown of each split, drawn at random
THUMBNAIL = 240  # pixels
PROMPT_LETTERS = 400  # shown of a prompt
IDS_SHOWN = 12
MODELS_SHOWN = 12
SEED = 0
Shown = tuple[str, str, str]  # an image's side, its size, and its markup
LABEL_KINDS = {"chosen": "win", "liked": "win", "rejected": "loss", "disliked": "loss", "ties": "tie"}


def write_check(output: Path, report: CheckReport, reproduce: list[str]) -> None:
    """Write the page. `reproduce` are the commands that make it again.

    Raises UserError where the dataset is no longer there or the page cannot be written.
    """
    sections = [_header(report), _overview(report)]
    for name, split in report.splits.items():
        dataset = PreferenceDataset.open(Path(report.path), name)
        found = [finding for finding in report.findings if finding.split == name]
        drawn = np.random.default_rng(SEED).permutation(len(dataset))[:DRAWN].tolist()
        shown = _images(dataset, {*drawn, *(row for finding in found for row in finding.rows[:EXAMPLES])})
        title = f"Split {name}" if len(report.splits) > 1 else "What it holds"
        content = [_numbers(split), *(_finding(finding, dataset, shown) for finding in found)]
        cards = "".join(_card(dataset, shown[row], row) for row in sorted(drawn))
        how = f"{len(drawn)} of {count(len(dataset), 'row')}, drawn at random."
        content.append(_found("Some rows", "", how, f'<div class="cards rows">{cards}</div>'))
        sections.append(section(title, "".join(content)))
    if reproduce:
        sections.append(section("How to reproduce", f"<pre>{html.escape(chr(10).join(reproduce))}</pre>"))
    write_whole(output, document(_title(report), sections).encode("utf-8"))


def _title(report: CheckReport) -> str:
    return f"Check of {Path(report.path).resolve().name}"


def _header(report: CheckReport) -> str:
    splits = report.splits.values()
    rows, bad = sum(split.rows for split in splits), sum(split.bad for split in splits)
    images, distinct = sum(split.images for split in splits), sum(split.distinct for split in splits)
    said = f"{count(bad, 'row')} of {rows:,} cannot be trained on" if bad else "Every row can be trained on"
    kinds = [finding.severity for finding in report.findings]
    others = f"{count(kinds.count('error'), 'kind')} of error, {count(kinds.count('warning'), 'kind')} of warning"
    measured = "" if report.tokenizer else " Prompt lengths in tokens were not measured: <code>--model</code> does."
    tiles = [
        tile("Rows", f"{rows:,}", f"of {count(len(report.splits), 'split')}"),
        tile("Different images", f"{distinct:,}", f"of {images:,}"),
        tile("Different captions", f"{sum(split.captions for split in splits):,}", "of all splits"),
    ]
    verdict = f'<p class="verdict"><strong>{said}</strong>; {others}.{measured}</p>'
    return f'<header><h1>{html.escape(_title(report))}</h1>{verdict}<div class="tiles">{"".join(tiles)}</div></header>'


def _overview(report: CheckReport) -> str:
    """Every finding in a line."""
    several = len(report.splits) > 1
    rows = "".join(
        f'<tr><th>{_badge(finding)}</th><td class="number">{len(finding.ids):,}</td><td>{html.escape(finding.kind)}'
        f'<div class="hint">{finding.text}{html.escape(f" (split {finding.split})") * several}</div></td></tr>'
        for finding in report.findings
    )
    return section("Found", f'<table class="overview">{rows}</table>' if rows else '<p class="hint">Nothing.</p>')


def _badge(finding: Finding) -> str:
    return f'<span class="badge badge-{finding.severity}">{finding.severity}</span>'


def _numbers(split: SplitReport) -> str:
    """A split's counts as charts."""
    labels = {name: number for name, number in split.labels.items() if name != "soft"}
    charts = [
        bar_chart("Labels", labels, LABEL_KINDS),
        bar_chart("Words of a caption", split.words),
        bar_chart("Image sizes", split.sizes),
        bar_chart("Image formats", split.formats),
    ]
    judged = {name: model for name, model in list(split.models.items())[:MODELS_SHOWN] if model.wins + model.losses}
    if split.models:
        drawn = {name: model.images for name, model in list(split.models.items())[:MODELS_SHOWN]}
        charts.append(bar_chart("Images by model", drawn))
    table = ""
    if judged:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>won {model.wins:,}, lost {model.losses:,} "
            f"({model.wins / (model.wins + model.losses):.0%} won)</td></tr>"
            for name, model in judged.items()
        )
        table = f'<div class="found facts"><h3>Wins by model</h3><table>{rows}</table></div>'
    verb = "is" if split.labels["soft"] == 1 else "are"
    soft = f"{count(split.labels['soft'], 'label')} {verb} neither 0, 0.5 nor 1. " if split.labels["soft"] else ""
    hint = f"{count(split.rows, 'row')} of {split.kind}. {soft}The longest caption has {split.longest:,} characters."
    return f'<p class="hint">{hint}</p><div class="charts">{"".join(charts)}</div>{table}'


def _finding(finding: Finding, dataset: PreferenceDataset, shown: dict[int, list[Shown]]) -> str:
    """One kind of finding with the first ids and the first rows."""
    noun = "row" if finding.rows else "column"
    ids = ", ".join(finding.ids[:IDS_SHOWN]) + (", ..." if len(finding.ids) > IDS_SHOWN else "")
    if noun == "column":
        ids = ", ".join(
            f"{name} ({told})" if told else name for name, told in zip(finding.ids, finding.details, strict=True)
        )
    examples = zip(finding.rows[:EXAMPLES], finding.details, strict=False)
    cards = "".join(_card(dataset, shown[row], row, detail) for row, detail in examples)
    text = f"{count(len(finding.ids), noun)}: {finding.text}.<br>{html.escape(ids)}"
    return _found(finding.kind, _badge(finding), text, f'<div class="cards rows">{cards}</div>' if cards else "")


def _found(title: str, badge: str, hint: str, content: str) -> str:
    return f'<div class="found"><h3>{html.escape(title)}{badge}</h3><p class="hint">{hint}</p>{content}</div>'


def _images(dataset: PreferenceDataset, rows: set[int]) -> dict[int, list[Shown]]:
    """Of each row its images as thumbnails."""
    shown: dict[int, list[Shown]] = {}
    for row, side, content in dataset.iter_images(rows):
        size, thumbnail = _thumbnail(content, f"{side}: {_short(dataset.caption(row, side))}")
        shown.setdefault(row, []).append((side, size, thumbnail))
    return shown


def _card(dataset: PreferenceDataset, shown: list[Shown], row: int, detail: str = "") -> str:
    """A row's images with their sizes, its captions, its id, its label and what else is to be said of it."""
    captions = dict.fromkeys(_short(dataset.caption(row, side)) for side in dataset.sides)
    label = dataset.labels[row]
    told = [dataset.ids[row], detail, "" if np.isnan(label) else f"label {label:.3g}"]
    note = "".join(f"<span>{html.escape(_short(text))}</span>" for text in told if text)
    return card(shown, " / ".join(captions), note)


def _thumbnail(content: bytes, text: str) -> tuple[str, str]:
    """The image's size, and markup of it or of what is wrong with it."""
    try:
        image = decode(content)
    except BadImage as error:
        return "", f'<div class="broken">{html.escape(f"{error.reason}: {error}")}</div>'
    return f"{image.width} x {image.height}", picture(image, text, THUMBNAIL)


def _short(text: str) -> str:
    if not text.strip():
        return "(no caption)"
    return text if len(text) <= PROMPT_LETTERS else f"{text[:PROMPT_LETTERS]}…"
