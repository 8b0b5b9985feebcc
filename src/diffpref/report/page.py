"""The report: one HTML file, or a folder with its pictures beside the page. It asks the network for nothing."""

import html
import math
from pathlib import Path

from diffpref.data.writing import whole_folder
from diffpref.evaluate.compare import Comparison
from diffpref.files import write_whole
from diffpref.report.charts import Line, Reference, line_chart
from diffpref.report.comparison import numbers, spreads, summary, tables
from diffpref.report.gallery import Look, gallery, sample_cards, script
from diffpref.report.output import INDEX, is_file
from diffpref.report.parts import document, section, tile
from diffpref.report.pictures import LARGEST_SHOWN, Beside
from diffpref.report.run import RunRecord, read_run

SAMPLES = 24


def write_report(
    output: Path,
    *,
    title: str,
    run: Path | None,
    comparison: Comparison | None,
    reproduce: list[str],
    each: int = 8,
    picture_size: int = LARGEST_SHOWN,
) -> None:
    """Write the page of a run, of a comparison, or of both.

    output: PAGE.html for one file, else a folder, whose page shows every pair. each: pairs shown of each kind.
    `reproduce` are the commands that make all this again. Raises UserError where something shown cannot be read or the
    page cannot be written.
    """
    record = None if run is None else read_run(run)
    if is_file(output):
        page = _page(title, record, comparison, reproduce, Look(each, picture_size=picture_size))
        write_whole(output, page.encode("utf-8"))
        return
    with whole_folder(output) as folder:
        look = Look(each, rest=True, picture_size=picture_size, keep=Beside(folder))
        write_whole(folder / INDEX, _page(title, record, comparison, reproduce, look, files=True).encode("utf-8"))


def _page(
    title: str,
    record: RunRecord | None,
    comparison: Comparison | None,
    reproduce: list[str],
    look: Look,
    files: bool = False,
) -> str:
    sections = [_header(title, record, comparison)]
    if comparison is not None:
        sections += [tables(comparison), gallery(comparison, look), spreads(comparison), numbers(comparison)]
    if record is not None:
        if comparison is None and record.samples is not None:
            sections.append(_samples(record.samples, SAMPLES))
        sections += [_curves(record), _config(record)]
    if reproduce:
        sections.append(section("How to reproduce", f"<pre>{html.escape(chr(10).join(reproduce))}</pre>"))
    return document(title, sections, "" if comparison is None else script(), files)


def _header(title: str, record: RunRecord | None, comparison: Comparison | None) -> str:
    said, tiles = ("", []) if comparison is None else summary(comparison)
    if record is not None:
        tiles += _run_tiles(record)
    return f'<header><h1>{html.escape(title)}</h1>{said}<div class="tiles">{"".join(tiles)}</div></header>'


def _run_tiles(record: RunRecord) -> list[str]:
    implicit = record.series("implicit_accuracy").final()
    held_out = record.series("heldout_accuracy").final()
    speed = record.series("pairs_per_second").median()
    tiles = []
    if implicit is not None:
        tiles.append(tile("Implicit accuracy", f"{implicit:.1%}", "training pairs, at the end of the run"))
    if held_out is not None:
        tiles.append(tile("Held-out accuracy", f"{held_out:.1%}", "pairs not trained on, at the end"))
    if speed is not None:
        tiles.append(tile("Pairs a second", f"{speed:.3g}", "median of the logged steps"))
    return tiles


def _samples(folder: Path, size: int) -> str:
    cards = "".join(sample_cards(folder, size))
    note = f"The newest validation images, from <code>{html.escape(folder.name)}</code>."
    return section("Samples", f'<p class="hint">{note}</p><div class="cards small">{cards}</div>')


def _curves(record: RunRecord) -> str:
    half = Reference(0.5, "chance")
    charts = [
        _chart(record, "Loss", _log_two(record), loss="training", heldout_loss="held out"),
        _chart(record, "Implicit accuracy", half, percent=True, implicit_accuracy="training"),
        _chart(record, "Reward margin", Reference(0.0, "no preference"), reward_margin="training"),
        _chart(record, "Held-out accuracy", half, percent=True, heldout_accuracy="held out"),
        _chart(
            record,
            "Prediction errors",
            policy_error_chosen="chosen",
            policy_error_rejected="rejected",
            reference_error="reference",
        ),
        _chart(record, "Error on chosen images", policy_error_chosen="policy", reference_error_chosen="reference"),
        _chart(record, "Gradient norm", grad_norm="training"),
    ]
    note = (
        "Faint: as logged. Bold: running mean. Beside the title: the last value, of a long curve its last tenth’s mean."
    )
    if not any(charts):
        note = "The run has logged no metrics."
    return section("Training", f'<p class="hint">{note}</p><div class="charts">{"".join(charts)}</div>')


def _chart(
    record: RunRecord, title: str, reference: Reference | None = None, *, percent: bool = False, **names: str
) -> str:
    """The chart of the metrics `names` (key = name in the legend); nothing where the run logged none of them."""
    lines = [Line(name, record.series(key)) for key, name in names.items()]
    return line_chart(title, lines, reference, percent) if any(line.series.finite() for line in lines) else ""


def _log_two(record: RunRecord) -> Reference | None:
    """Where a preference loss starts. Other losses (SFT's) have another scale, so the line would only squeeze them."""
    preference = bool(record.series("reward_margin").finite())
    return Reference(math.log(2), "log 2") if preference else None


def _config(record: RunRecord) -> str:
    if record.config is None:
        return section("Configuration", '<p class="hint">The run has no config.yaml.</p>')
    environment = ""
    if record.environment is not None:
        environment = f"<details><summary>Environment</summary><pre>{html.escape(record.environment)}</pre></details>"
    return section("Configuration", f"<pre>{html.escape(record.config.rstrip())}</pre>{environment}")
