"""The report: one self-contained HTML file. It asks the network for nothing and runs no script."""

import html
import math
from pathlib import Path

from diffpref.evaluate.compare import Comparison
from diffpref.files import write_whole
from diffpref.report.charts import Line, Reference, histogram, line_chart
from diffpref.report.gallery import choices, pair_card, sample_cards
from diffpref.report.parts import count, document, section, tile
from diffpref.report.run import RunRecord, read_run


def write_report(
    output: Path,
    *,
    title: str,
    run: Path | None,
    comparison: Comparison | None,
    reproduce: list[str],
    gallery_size: int = 24,
) -> None:
    """Write the page of a run, of a comparison (a is the base, b the tuned model), or of both.

    `reproduce` are the commands that make all this again. Raises UserError where something shown cannot be read or
    the page cannot be written.
    """
    record = None if run is None else read_run(run)
    sections = [_header(title, record, comparison)]
    if comparison is not None:
        sections += [_gallery(comparison, gallery_size), _numbers(comparison)]
    if record is not None:
        if comparison is None and record.samples is not None:
            sections.append(_samples(record.samples, gallery_size))
        sections += [_curves(record), _config(record)]
    if reproduce:
        sections.append(section("How to reproduce", f"<pre>{html.escape(chr(10).join(reproduce))}</pre>"))
    write_whole(output, document(title, sections).encode("utf-8"))


def _header(title: str, record: RunRecord | None, comparison: Comparison | None) -> str:
    tiles = []
    verdict = ""
    if comparison is not None:
        verdict = f'<p class="verdict">{_verdict(comparison)}</p>'
        tiles += [_win_rate_tile(comparison), _score_tile(comparison)]
    if record is not None:
        tiles += _run_tiles(record)
    return f'<header><h1>{html.escape(title)}</h1>{verdict}<div class="tiles">{"".join(tiles)}</div></header>'


def _verdict(comparison: Comparison) -> str:
    """What the interval allows to say, and no more."""
    if comparison.win_rate_low > 0.5:
        said = "The tuned model beats the base model"
    elif comparison.win_rate_high < 0.5:
        said = "The tuned model loses to the base model"
    else:
        said = "No clear difference between the tuned and the base model"
    judge = html.escape(f"{comparison.scorer} {comparison.version}")
    pairs = f"{count(comparison.images, 'pair')} of images with the same prompt and seed"
    return f"<strong>{said}</strong> on {count(comparison.prompts, 'prompt')}, {pairs}, judged by <em>{judge}</em>."


def _win_rate_tile(comparison: Comparison) -> str:
    low, high = comparison.win_rate_low, comparison.win_rate_high
    bar = (
        f'<div class="interval" role="img" aria-label="95% interval {low:.1%} to {high:.1%}">'
        f'<i class="range" style="left:{low:.2%};width:{high - low:.2%}"></i>'
        f'<i class="half"></i><i class="point" style="left:{comparison.win_rate:.2%}"></i></div>'
    )
    return tile("Win rate", f"{comparison.win_rate:.1%}", f"95% interval {low:.1%} to {high:.1%}", bar, "wide")


def _score_tile(comparison: Comparison) -> str:
    means = f'<span class="from">{comparison.mean_a:.3f} →</span> {comparison.mean_b:.3f}'
    note = (
        f"difference {_signed(comparison.mean_difference)}, 95% interval "
        f"{_signed(comparison.mean_difference_low)} to {_signed(comparison.mean_difference_high)}"
    )
    return tile("Mean score, base → tuned", means, note, kind="wide")


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


def _gallery(comparison: Comparison, size: int) -> str:
    parts = []
    for choice in choices(comparison, size):
        cards = "".join(map(pair_card, choice.pairs))
        parts.append(f'<h3>{choice.title}</h3><p class="hint">{choice.how}</p><div class="cards">{cards}</div>')
    return section("Same prompt, same seed", "".join(parts))


def _numbers(comparison: Comparison) -> str:
    share = {name: getattr(comparison, name) / comparison.images for name in ("wins", "losses", "ties")}
    effect = "undefined" if comparison.effect_size is None else f"{comparison.effect_size:.2f}"
    p_value = f"{comparison.p_value:.2g}" if comparison.p_value >= 1e-300 else "below 1e-300"
    rows = {
        "Won by the tuned model": f"{comparison.wins} ({share['wins']:.1%})",
        "Lost": f"{comparison.losses} ({share['losses']:.1%})",
        "Tied, counted half": f"{comparison.ties} ({share['ties']:.1%})",
        "Sign test over prompts, two-sided p": p_value,
        "Effect size (Cohen’s d of paired differences)": effect,
        "Base images": str(comparison.folder_a),
        "Tuned images": str(comparison.folder_b),
    }
    table = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
    note = "Intervals are 95% percentile bootstrap intervals that resample whole prompts."
    chart = histogram("Change in score", [pair.difference for pair in comparison.pairs])
    return section(
        "All pairs",
        f'<div class="halves">{chart}<div class="facts"><table>{table}</table><p class="hint">{note}</p></div></div>',
    )


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


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
