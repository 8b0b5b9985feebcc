"""The page of a check: it shows what was found, a bounded number of rows, and no text of the data as markup."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.datasets import encoded, jpeg, make_images, noise, write_rows, write_spoilt, write_trl
from support.pages import NASTY, Page, assert_self_contained

from diffpref.__main__ import main
from diffpref.data.check import check
from diffpref.errors import UserError
from diffpref.report.charts import BAR_WIDTH
from diffpref.report.data import DRAWN, EXAMPLES, THUMBNAIL, write_check


def written(dataset: Path, output: Path) -> Page:
    write_check(output, check(dataset), [f"diffpref data check {dataset}"])
    return Page(output)


def test_every_finding_is_on_the_page(tmp_path: Path):
    dataset = write_spoilt(tmp_path / "data", "plain")
    page = written(dataset, tmp_path / "page.html")
    report = check(dataset)
    assert len({finding.kind for finding in report.findings}) >= 11
    for finding in report.findings:
        assert page.text.count(finding.kind) >= 2  # in the overview, and with its rows
        assert finding.text in page.text
    for text in (
        "Check of data",
        "15 rows of 34 cannot be trained on",
        "Split train",
        "Split test",
        "Labels",
        "Words of a caption",
        "24 x 16",
        "JPEG",
        "1 label is neither 0, 0.5 nor 1",
        "against plain 12",
        "empty: no bytes",
        "(no caption)",
        "How to reproduce",
    ):
        assert text in page.text, text


def test_a_good_dataset_has_a_page_too(tmp_path: Path):
    write_rows(tmp_path / "data", make_images(3, prompt=["a", "b", "c"]))
    page = written(tmp_path / "data", tmp_path / "page.html")
    assert "Every row can be trained on" in page.text
    assert "Nothing." in page.text
    assert len(page.images()) == 3


def test_the_page_is_self_contained_and_no_text_of_the_data_is_markup(tmp_path: Path):
    written(write_spoilt(tmp_path / "data", NASTY), tmp_path / "page.html")
    assert_self_contained(tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count(NASTY) >= 10
    assert f"chosen: {NASTY}" in {image["alt"] for image in page.images()}
    assert NASTY not in (tmp_path / "page.html").read_text()
    known = {"class", "style", "src", "width", "height", "alt", "dir", "charset", "http-equiv", "content", "name"}
    drawn = {"viewbox", "role", "x", "y", "text-anchor", "lang", "rel", "href"}
    assert {name for _, attributes in page.elements for name in attributes} <= known | drawn


def test_however_many_rows_are_found_few_are_shown(tmp_path: Path):
    write_trl(tmp_path / "data" / "a.parquet", [(f"p{n}", jpeg(n), jpeg(n)) for n in range(60)])
    page = written(tmp_path / "data", tmp_path / "page.html")
    assert "60 rows" in page.text
    assert len(page.images()) == 2 * (EXAMPLES + DRAWN)


def test_small_pictures_are_shown_as_they_are_and_large_ones_reduced(tmp_path: Path):
    small, large = encoded(noise(0)), encoded(noise(1, 600, 300))
    write_trl(tmp_path / "data" / "a.parquet", [("p", small, large)])
    shown = written(tmp_path / "data", tmp_path / "page.html").images()
    assert [(image["width"], image["height"]) for image in shown] == [
        ("24", "16"),
        (str(THUMBNAIL), str(THUMBNAIL // 2)),
    ]
    source = shown[0]["src"]
    assert source is not None
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))
    assert np.array_equal(pixels, np.asarray(noise(0)))


def test_bars_are_as_long_as_their_counts(tmp_path: Path):
    write_trl(
        tmp_path / "data" / "a.parquet",
        [(f"p{n}", jpeg(2 * n), jpeg(2 * n + 1)) for n in range(8)],
        label=[1.0] * 6 + [0.0] * 2,
    )
    written(tmp_path / "data", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    widths = dict(re.findall(r'<rect class="bar (\w+)" [^>]*width="([\d.]+)"', text))
    assert float(widths["win"]) == pytest.approx(3 * float(widths["loss"]), abs=0.2)
    assert float(widths["win"]) == BAR_WIDTH
    assert float(widths["tie"]) == 0


def test_the_command_writes_it_even_where_the_check_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    dataset, output = write_spoilt(tmp_path / "data", "plain"), tmp_path / "new" / "page.html"
    assert main(["data", "check", str(dataset), "--html", str(output)]) == 2
    assert f"page: {output}" in capsys.readouterr().out
    assert "Check of data" in output.read_text()
    assert "diffpref data check" in Page(output).text


def test_what_cannot_be_written_is_one_line(tmp_path: Path):
    write_trl(tmp_path / "data" / "a.parquet", [("p", jpeg(0), jpeg(1))])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        written(tmp_path / "data", tmp_path / "file" / "page.html")
