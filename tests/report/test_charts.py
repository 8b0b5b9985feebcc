"""Charts: valid SVG whatever the data, round ticks, an honest running mean."""

import math
import re
from xml.etree import ElementTree

import pytest

from diffpref.report.charts import MOST_POINTS, Line, Reference, histogram, line_chart, round_ticks, running_mean
from diffpref.report.run import Series

NAN = math.nan


def line(values: list[float], name: str = "a") -> Line:
    return Line(name, Series([float(step) for step in range(len(values))], values))


def drawn(figure: str) -> ElementTree.Element:
    """The figure's SVG as a tree: it must be well formed and hold no number that is none."""
    found = re.search(r"<svg.*</svg>", figure, re.DOTALL)
    assert found, figure
    assert "nan" not in found[0]
    assert "inf" not in found[0]
    return ElementTree.fromstring(found[0])


def curves(figure: str) -> list[ElementTree.Element]:
    return [path for path in drawn(figure).iter("path") if "curve" in path.attrib["class"]]


def test_a_curve_goes_up_when_its_values_do():
    path = curves(line_chart("t", [line([1.0, 2.0, 4.0])]))[0].attrib["d"]
    points = [tuple(map(float, point.split())) for point in path.removeprefix("M").split("L")]
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=True)
    assert ys[0] - ys[1] == pytest.approx((ys[1] - ys[2]) / 2, abs=0.2)


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0], [2.0, 2.0], [NAN, 1.0, NAN], [1.0, math.inf, 2.0], [1e-9, 2e-9], [-1e6, 3e7], [0.5] * 100],
)
def test_odd_data_still_draws(values: list[float]):
    figure = line_chart("t", [line(values)], Reference(0.5, "chance"))
    assert drawn(figure).find("title") is not None
    assert curves(figure)


@pytest.mark.parametrize("lines", [[], [line([])], [line([NAN, NAN])]])
def test_no_data_says_so(lines: list[Line]):
    figure = line_chart("t", lines)
    assert "nothing logged" in figure
    assert "<svg" not in figure


def test_a_gap_breaks_the_curve():
    path = curves(line_chart("t", [line([1.0, 2.0, NAN, 3.0])]))[0].attrib["d"]
    assert path.count("M") == 2
    assert path.endswith("h0")  # a single point after the gap still shows


def test_long_curves_are_drawn_twice_and_thinned_with_their_peaks():
    values = [0.0] * 20_000
    values[7_777] = 50.0
    raw, smooth = curves(line_chart("t", [line(values)]))
    assert "raw" in raw.attrib["class"]
    assert "raw" not in smooth.attrib["class"]
    assert raw.attrib["d"].count("L") <= MOST_POINTS + 2
    heights = [float(point.split()[1]) for point in raw.attrib["d"].removeprefix("M").split("L")]
    assert max(heights) - min(heights) > 100


def test_the_key_tells_where_each_curve_ends():
    figure = line_chart("t", [line([1.0, 2.0], "chosen"), line([], "lost"), line([3.0, 4.0], "rejected")])
    assert re.findall(r'"swatch (s\d)"></i>(\w+) <b>([^<]+)</b>', figure) == [
        ("s0", "chosen", "2"),
        ("s2", "rejected", "4"),
    ]
    assert "<b>75.0%</b>" in line_chart("t", [line([0.5, 0.75])], percent=True)


def test_the_reference_lies_where_its_value_does():
    figure = line_chart("t", [line([0.0, 1.0])], Reference(0.5, "log <2>"))
    path = next(path for path in drawn(figure).iter("path") if path.attrib["class"] == "reference")
    first, last = re.findall(r"[\d.]+ ([\d.]+)", curves(figure)[0].attrib["d"])
    height = float(path.attrib["d"].split()[1].split("H")[0])
    assert height == pytest.approx((float(first) + float(last)) / 2, abs=0.1)
    assert "log &lt;2&gt;" in figure


def test_titles_are_escaped():
    figure = line_chart("<b>&", [line([1.0])])
    assert "<h3>&lt;b&gt;&amp;</h3>" in figure
    assert drawn(figure).findtext("title") == "<b>&"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.5, 0.72, [0.5, 0.55, 0.6, 0.65, 0.7]),
        (-3.0, 9.0, [-2, 0, 2, 4, 6, 8]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]):
    assert round_ticks(low, high) == pytest.approx(expected)


def test_the_running_mean_by_hand():
    values = [float(place % 2) for place in range(50)]  # the window is 2 to each side
    smooth = running_mean(values)
    assert smooth[:3] == pytest.approx([1 / 3, 1 / 2, 2 / 5])
    assert smooth[3] == pytest.approx(3 / 5)
    values[3] = NAN
    gapped = running_mean(values)
    assert math.isnan(gapped[3])
    assert gapped[2] == pytest.approx(1 / 4)
    assert running_mean([1.0, 5.0]) == [1.0, 5.0]


def test_the_histogram_counts_losses_ties_and_wins():
    figure = histogram("t", [-1.0, -1.0, 0.0, 0.5, 1.0, 1.0, 1.0])
    bars = [bar for bar in drawn(figure).iter("rect") if float(bar.attrib["height"]) > 0]
    assert [bar.attrib["class"] for bar in bars] == ["bar loss", "bar tie", "bar win", "bar win"]
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights[0] / heights[1] == pytest.approx(2, rel=0.02)
    assert heights[3] / heights[1] == pytest.approx(3, rel=0.02)
    drawn(histogram("t", []))
    drawn(histogram("t", [0.0, 0.0]))
