"""Charts as inline SVG, written by hand: their colours are the page's CSS variables, so they follow light and dark."""

import html
import math
from dataclasses import dataclass

import numpy as np

from diffpref.report.run import FEW, Series

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 36
BAR_LEFT, BAR_WIDTH, BAR_STEP = 128, 170, 22  # where bars begin, how long the longest is, how far they are apart
NAME_LETTERS = 18  # of a bar's name that find room beside it
SMOOTH_SHARE = 0.08  # of a line's values, the width of the running mean
MOST_POINTS = 600  # drawn of one line; more would only weigh


@dataclass(frozen=True)
class Line:
    """A named curve; its values may have gaps."""

    name: str
    series: Series


@dataclass(frozen=True)
class Reference:
    """A value to compare a curve with, drawn as a horizontal line."""

    value: float
    label: str


@dataclass(frozen=True)
class _Frame:
    """Maps data to the picture: the ranges that the axes span."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def line_chart(title: str, lines: list[Line], reference: Reference | None = None, percent: bool = False) -> str:
    """A figure of curves over steps: each faint as logged and bold as its running mean, with where it ends."""
    drawn = [(place, line.name, _gapped(line.series)) for place, line in enumerate(lines) if line.series.finite()]
    if not drawn:
        return _figure(title, "", '<p class="empty">nothing logged</p>')
    steps = [step for _, _, series in drawn for step in series.steps]
    values = [value for _, _, series in drawn for value in series.finite()]
    frame = _frame_of(steps, [*values, *([reference.value] if reference else [])], percent)
    parts = [*_axes(frame, percent), *([_reference(frame, reference)] if reference else [])]
    keys = []
    for place, name, series in drawn:
        parts += _curves(frame, series, place)
        end = series.final() or 0.0
        keys.append(_key(place, name if len(drawn) > 1 else "", f"{end:.1%}" if percent else f"{end:.3g}"))
    return _figure(title, "".join(keys), _svg(title, parts))


def histogram(title: str, values: list[float], bins: int = 21) -> str:
    """A figure of how often which value occurs, zero in the middle; `bins` is odd, so one bar holds the ties."""
    widest = max((abs(value) for value in values), default=0.0) or 1.0
    counts, edges = np.histogram(values, bins=bins, range=(-widest, widest))
    frame = _Frame(-widest, widest, 0.0, 1.05 * max(counts.max().item(), 1))
    parts = _axes(frame, percent=False, x_label="score difference, tuned − base", whole=True)
    borders = edges.tolist()
    for count, left, right in zip(counts.tolist(), borders[:-1], borders[1:], strict=True):
        middle = (left + right) / 2
        kind = "tie" if abs(middle) < widest / bins else "win" if middle > 0 else "loss"
        x, top = frame.x(left) + 0.75, frame.y(float(count))
        size = f'width="{frame.x(right) - x - 0.75:.1f}" height="{frame.y(0.0) - top:.1f}"'
        parts.append(f'<rect class="bar {kind}" x="{x:.1f}" y="{top:.1f}" {size}/>')
    return _figure(title, "", _svg(title, parts))


def bar_chart(title: str, counts: dict[str, int], kinds: dict[str, str] | None = None) -> str:
    """A figure of how many there are of what, a bar each. kinds: the class of some bars: win, loss or tie."""
    if not counts:
        return _figure(title, "", '<p class="empty">nothing to count</p>', "bars")
    most, total = max(*counts.values(), 1), max(sum(counts.values()), 1)
    parts = []
    for place, (name, count) in enumerate(counts.items()):
        y = place * BAR_STEP
        kind, width = (kinds or {}).get(name, ""), BAR_WIDTH * count / most
        shown = name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…"
        parts += [
            f'<text x="{BAR_LEFT - 8}" y="{y + 15}" text-anchor="end">{html.escape(shown)}</text>',
            f'<rect class="bar {kind}" x="{BAR_LEFT}" y="{y + 4}" width="{width:.1f}" height="{BAR_STEP - 8}"/>',
            f'<text x="{BAR_LEFT + width + 6:.1f}" y="{y + 15}">{count:,} · {count / total:.0%}</text>',
        ]
    return _figure(title, "", _svg(title, parts, len(counts) * BAR_STEP), "bars")


def running_mean(values: list[float]) -> list[float]:
    """A centred running mean that leaves gaps out and keeps them; few values are returned as they are."""
    if len(values) < FEW:
        return list(values)
    half = max(1, round(len(values) * SMOOTH_SHARE / 2))
    given = np.array(values, dtype=np.float64)
    known = ~np.isnan(given)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, given, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(given))
    start, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(given))
    mean = (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)
    return np.where(known, mean, np.nan).tolist()


def round_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    step = _round_step(low, high, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def _round_step(low: float, high: float, count: int) -> float:
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.65 * raw)


def _gapped(series: Series) -> Series:
    """The same series with every value that is not finite as a gap."""
    return Series(series.steps, [value if math.isfinite(value) else math.nan for value in series.values])


def _frame_of(steps: list[float], values: list[float], percent: bool) -> _Frame:
    x_low, x_high = min(steps), max(steps)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 0.1
    y_low, y_high = low - margin, high + margin
    if percent:
        y_low, y_high = max(y_low, 0.0), min(y_high, 1.0)
    return _Frame(x_low, x_high, y_low, y_high)


def _axes(frame: _Frame, percent: bool, x_label: str = "step", whole: bool = False) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    y_step = _round_step(frame.y_low, frame.y_high, 4)
    for value in round_ticks(frame.y_low, frame.y_high):
        if whole and value != round(value):
            continue
        y = frame.y(value)
        label = f"{value:.0%}" if percent and y_step >= 0.01 else _label(value, y_step)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    x_step = _round_step(frame.x_low, frame.x_high, 5)
    for value in round_ticks(frame.x_low, frame.x_high, 5):
        x = frame.x(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{_label(value, x_step)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(x_label)}</text>')
    return parts


def _label(value: float, step: float) -> str:
    """A tick's text, with just the decimals that its neighbours need."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 and step >= 1_000:
        text = f"{value / 1000:g}k"
    elif step < 1e-4:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    return text.replace("-", "−")


def _reference(frame: _Frame, reference: Reference) -> str:
    y, right = frame.y(reference.value), WIDTH - RIGHT
    below = y < TOP + 16
    text = f'<text class="reference" x="{right}" y="{y + (13 if below else -5):.1f}" text-anchor="end">'
    return f'<path class="reference" d="M{LEFT} {y:.1f}H{right}"/>{text}{html.escape(reference.label)}</text>'


def _curves(frame: _Frame, series: Series, place: int) -> list[str]:
    points = _points(frame, series.steps, running_mean(series.values))
    if len(series.values) < FEW:
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for part in points for x, y in part)
        return [f'<path class="curve s{place}" d="{_path(points)}"/>', f'<g class="dots s{place}">{dots}</g>']
    raw = _path(_points(frame, series.steps, series.values))
    x, y = points[-1][-1]
    return [
        f'<path class="curve raw s{place}" d="{raw}"/>',
        f'<path class="curve s{place}" d="{_path(points)}"/>',
        f'<g class="dots s{place}"><circle cx="{x:.1f}" cy="{y:.1f}" r="2.8"/></g>',
    ]


def _points(frame: _Frame, steps: list[float], values: list[float]) -> list[list[tuple[float, float]]]:
    """The curve's unbroken parts as points of the picture, thinned so that peaks stay."""
    parts: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if math.isnan(value):
            parts.append([])
        else:
            parts[-1].append((frame.x(step), frame.y(value)))
    width = 2 * math.ceil(len(values) / MOST_POINTS)
    return [_thinned(part, width) if width > 2 else part for part in parts if part]


def _thinned(points: list[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """The lowest and the highest of each `width` points, and the last."""
    kept = []
    for start in range(0, len(points), width):
        bucket = points[start : start + width]
        kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _path(parts: list[list[tuple[float, float]]]) -> str:
    """Path commands for the parts; a part of one point becomes a dot by its round line cap."""
    text = []
    for part in parts:
        text.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in part) + ("h0" if len(part) == 1 else ""))
    return "".join(text)


def _key(place: int, name: str, value: str) -> str:
    label = f"{html.escape(name)} " if name else ""
    return f'<li><i class="swatch s{place}"></i>{label}<b>{value}</b></li>'


def _figure(title: str, keys: str, picture: str, kind: str = "") -> str:
    legend = f'<ul class="keys">{keys}</ul>' if keys else ""
    caption = f"<figcaption><h3>{html.escape(title)}</h3>{legend}</figcaption>"
    return f'<figure class="chart {kind}">{caption}{picture}</figure>'


def _svg(title: str, parts: list[str], height: int = HEIGHT) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f'<svg {size} role="img"><title>{html.escape(title)}</title>{"".join(parts)}</svg>'
