"""A comparison in numbers, as parts of a page: verdicts, alarms, tables, diversity and drift, all differences."""

from html import escape
from pathlib import Path

from diffpref.evaluate.alarms import WORDS
from diffpref.evaluate.compare import Comparison
from diffpref.evaluate.results import Result
from diffpref.report.charts import histogram
from diffpref.report.parts import count, section, tile

VERDICTS = {
    "better": "{tuned} beats {base}",
    "worse": "{tuned} loses to {base}",
    "no clear difference": "No clear difference between {tuned} and {base}",
}
HEAD = ("Model", "Scorer", "Prompts", "Win rate", "Difference", "Effect", "p", "Holm", "FDR", "Verdict")


def summary(comparison: Comparison) -> tuple[str, list[str]]:
    """What stands at the top: alarms and verdicts, and tiles for each tuned folder by the first scorer."""
    names = _names(comparison)
    alarms = [
        f'<p class="alarm"><strong>Alarm</strong> <em>{escape(names[alarm.folder])}</em>: {escape(alarm.text)}.</p>'
        for alarm in comparison.alarms
    ]
    first = [result for result in comparison.results if result.scorer == comparison.scorers[0]]
    verdicts = [f'<p class="verdict">{_verdict(comparison, result)}</p>' for result in first]
    if len(first) == 1:
        return "".join([*alarms, *verdicts]), [_win_rate_tile(first[0], "Win rate"), _score_tile(first[0])]
    tiles = [_win_rate_tile(result, f"Win rate of {escape(names[result.folder_b])}") for result in first]
    return "".join([*alarms, *verdicts]), tiles


def tables(comparison: Comparison) -> str:
    """Every result in a row where there are several; nothing for a single one."""
    results = [*comparison.results, *comparison.by_category]
    if len(results) == 1:
        return ""
    names = _names(comparison)
    parts = [_table("All prompts", comparison.results, names)]
    if comparison.by_category:
        parts.append(_table("By category", comparison.by_category, names))
    note = (
        "Win rates and differences are over the base, with 95% intervals. p is the sign test’s over prompts; Holm and "
        f"FDR (Benjamini and Hochberg) are the same corrected for all {len(results)} results on this page."
    )
    return section("Results", f'{"".join(parts)}<p class="hint">{note}</p>')


def spreads(comparison: Comparison) -> str:
    """Diversity and drift of each tuned folder."""
    if not comparison.spreads:
        return ""
    names, rows = _names(comparison), []
    for folder, each in zip(comparison.folders[1:], comparison.spreads, strict=True):
        diversity, change = "one image only", ""
        if each.diversity_a is not None and each.diversity_difference is not None:
            low, high = each.diversity_difference.low, each.diversity_difference.high
            diversity = f"{each.diversity_a:.4g} → {each.diversity_b:.4g}"
            share = "" if each.diversity_change is None else f"{each.diversity_change:+.0%}, "
            change = f"{share}{_signed(each.diversity_difference.value)} ({_signed(low)} to {_signed(high)})"
        drift = f"{each.drift.value:.4g} ({each.drift.low:.4g} to {each.drift.high:.4g})"
        rows.append(_row(("Model", "Diversity", "Change", "Drift"), (escape(names[folder]), diversity, change, drift)))
    head = "".join(f"<th>{name}</th>" for name in ("Model", "Diversity, base → tuned", "Change", "Drift"))
    first = comparison.spreads[0]
    note = (
        f"By {escape(first.features)} features, version {escape(first.version)}; in brackets 95% intervals. Diversity: "
        f"the mean distance between images of {WORDS[first.among]}. Drift: the mean distance of an image from the "
        "base’s of the same prompt and seed. A reward that rises while diversity falls may be bought with sameness."
    )
    table = f'<table class="results"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return section("Diversity and drift", f'{table}<p class="hint">{note}</p>')


def numbers(comparison: Comparison) -> str:
    """How all differences are spread, and for a single result its counts."""
    note = "Intervals are 95% percentile bootstrap intervals that resample whole prompts."
    charts = []
    for result in comparison.results:
        folder, scorer = comparison.folders.index(result.folder_b), comparison.scorers.index(result.scorer)
        of = "" if len(comparison.results) == 1 else f": {_names(comparison)[result.folder_b]}, {result.scorer}"
        charts.append(histogram(f"Change in score{of}", comparison.differences(folder, scorer).tolist()))
    if len(charts) > 1:
        return section("All pairs", f'<div class="charts">{"".join(charts)}</div><p class="hint">{note}</p>')
    facts = f'<div class="facts"><table>{_counts(comparison.results[0])}</table><p class="hint">{note}</p></div>'
    return section("All pairs", f'<div class="halves">{charts[0]}{facts}</div>')


def _names(comparison: Comparison) -> dict[Path, str]:
    return dict(zip(comparison.folders, comparison.names, strict=True))


def _verdict(comparison: Comparison, result: Result) -> str:
    tuned, base = "the tuned model", "the base model"
    if len(comparison.folders) > 2:
        tuned, base = _names(comparison)[result.folder_b], comparison.names[0]
    said = VERDICTS[result.verdict].format(tuned=tuned, base=base)
    said = said[0].upper() + said[1:] if said.startswith("the ") else said
    judge = escape(f"{result.scorer} {result.version}")
    pairs = f"{count(result.images, 'pair')} of images with the same prompt and seed"
    prompts = count(result.prompts, "prompt")
    return f"<strong>{escape(said)}</strong> on {prompts}, {pairs}, judged by <em>{judge}</em>."


def _win_rate_tile(result: Result, name: str) -> str:
    low, high = result.win_rate_low, result.win_rate_high
    return tile(name, f"{result.win_rate:.1%}", f"95% interval {low:.1%} to {high:.1%}", _interval(result), "wide")


def _interval(result: Result) -> str:
    low, high = result.win_rate_low, result.win_rate_high
    return (
        f'<div class="interval" role="img" aria-label="95% interval {low:.1%} to {high:.1%}">'
        f'<i class="range" style="left:{low:.2%};width:{high - low:.2%}"></i>'
        f'<i class="half"></i><i class="point" style="left:{result.win_rate:.2%}"></i></div>'
    )


def _score_tile(result: Result) -> str:
    means = f'<span class="from">{result.mean_a:.3f} →</span> {result.mean_b:.3f}'
    low, high = _signed(result.mean_difference_low), _signed(result.mean_difference_high)
    note = f"difference {_signed(result.mean_difference)}, 95% interval {low} to {high}"
    return tile("Mean score, base → tuned", means, note, kind="wide")


def _table(title: str, results: tuple[Result, ...], names: dict[Path, str]) -> str:
    rows = []
    for result in results:
        low, high = _signed(result.mean_difference_low), _signed(result.mean_difference_high)
        cells = (
            escape(names[result.folder_b]),
            escape(result.scorer),
            f"{result.prompts:,}" + (f" of {escape(result.category)}" if result.category else ""),
            f"<b>{result.win_rate:.1%}</b>{_interval(result)}",
            f'<b>{_signed(result.mean_difference)}</b><div class="hint">{low} to {high}</div>',
            _effect(result),
            _p_value(result.p_value),
            _p_value(result.p_holm),
            _p_value(result.p_fdr),
            f'<span class="{KINDS[result.verdict]}">{result.verdict}</span>',
        )
        rows.append(_row(HEAD, cells))
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    return (
        f'<h3>{title}</h3><table class="results"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


KINDS = {"better": "win", "worse": "loss", "no clear difference": "tie"}


def _row(head: tuple[str, ...], cells: tuple[str, ...]) -> str:
    """A table's row; each cell tells its column's name, which stands before it where the page is narrow."""
    told = [f'<td data-name="{name}">{cell}</td>' for name, cell in zip(head, cells, strict=True)]
    return f"<tr>{''.join(told)}</tr>"


def _counts(result: Result) -> str:
    share = {name: getattr(result, name) / result.images for name in ("wins", "losses", "ties")}
    rows = {
        "Won by the tuned model": f"{result.wins} ({share['wins']:.1%})",
        "Lost": f"{result.losses} ({share['losses']:.1%})",
        "Tied, counted half": f"{result.ties} ({share['ties']:.1%})",
        "Sign test over prompts, two-sided p": _p_value(result.p_value),
        "Effect size (Cohen’s d of paired differences)": _effect(result),
        "Base images": str(result.folder_a),
        "Tuned images": str(result.folder_b),
    }
    return "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())


def _effect(result: Result) -> str:
    return "undefined" if result.effect_size is None else f"{result.effect_size:.2f}".replace("-", "−")


def _p_value(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-300 else "below 1e-300"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
