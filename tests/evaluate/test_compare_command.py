"""`diffpref compare` with several folders and scorers, from the command line to JSON, text and page."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import fails
from support.generated import make_folder, read_rows, write_rows
from support.pages import Page, assert_self_contained

from diffpref.__main__ import main

SCORER = """
import numpy as np
class Scorer:
    name, version = "{name}", "1"
    def __call__(self, images, prompts):
        return [{sign} * float(np.asarray(image).mean()) / 255 for image in images]
def load(device):
    return Scorer()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images of a base and two tuned models, one of them far brighter, and two scorers."""
    monkeypatch.chdir(tmp_path)
    for name, lift in (("base", 0), ("bright", 60), ("other", 0)):
        folder = make_folder(Path(name), clutter=0.5 if name == "other" else 0.2, prompts=12, per_prompt=2)
        rows = read_rows(folder)
        for row in rows:
            file = folder / row["file_name"]
            Image.open(file).point(lambda value, lift=lift: min(255, value + lift)).save(file)
        kinds = ("anime", "photo")
        write_rows(folder, [{**row, "category": kinds[number // 2 % 2]} for number, row in enumerate(rows)])
    for name, sign in (("light", 1), ("dark", -1)):
        Path(f"{name}.py").write_text(SCORER.format(name=name, sign=sign))
    return tmp_path


BOTH = ["--scorer", "light.py,dark.py"]


def test_several_folders_and_scorers_as_json(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "base", "bright", "other", *BOTH, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["folder_b"], each["scorer"]) for each in found] == [
        ("bright", "light"),
        ("bright", "dark"),
        ("other", "light"),
        ("other", "dark"),
    ]
    assert [each["verdict"] for each in found[:2]] == ["better", "worse"]
    assert [[alarm["kind"] for alarm in each["alarms"]] for each in found] == [["held_out_falls"]] * 2 + [[]] * 2
    for each in found:
        assert [part["category"] for part in each["categories"]] == ["anime", "photo"]
        assert {part["scorer"] for part in each["categories"]} == {each["scorer"]}
        assert each["p_value"] <= each["p_fdr"] <= each["p_holm"] <= 1
    spread = found[0]["spread"]
    assert (spread["features"], spread["among"]) == ("pixels", "prompt")
    assert spread["drift"]["low"] <= spread["drift"]["value"] <= spread["drift"]["high"]


def test_a_combination_is_one_more_result_without_alarms(place: Path, capsys: pytest.CaptureFixture[str]):
    combine = ["--combine", "light:2,dark:1", "--combine-by", "sum", "--features", "none", "--json"]
    assert main(["compare", "base", "bright", "other", *BOTH, *combine]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["scorer"] for each in found] == ["light", "dark", "sum(light:2,dark:1)"] * 2
    assert found[2]["version"] == f"{found[0]['version']}+{found[1]['version']}"
    for light, both in ((found[0], found[2]), (found[3], found[5])):  # 2 light - light
        assert both["mean_difference"] == pytest.approx(light["mean_difference"])
        assert both["win_rate"] == light["win_rate"]
    assert [len(each["alarms"]) for each in found] == [1, 1, 1, 0, 0, 0]  # the folder's, of dark alone
    page = ["--combine", "light,dark", "--combine-by", "rank", "--output", "page.html"]
    assert main(["compare", "base", "bright", *BOTH, *page]) == 0
    assert "rank(light:1,dark:1)" in Path("page.html").read_text(encoding="utf-8")


def test_standardised_scores_count_all_folders_together(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "base", "bright", *BOTH, "--combine", "light", "--features", "none", "--json"]) == 0
    light, _, standardised = json.loads(capsys.readouterr().out)
    images = [
        Image.open(file).convert("RGB") for name in ("base", "bright") for file in sorted(Path(name).glob("*.png"))
    ]
    values = np.array([np.asarray(image).mean() / 255 for image in images])
    assert standardised["scorer"] == "zscore(light:1)"
    assert standardised["mean_difference"] == pytest.approx(light["mean_difference"] / values.std())


def test_a_single_result_is_one_object(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "base", "other", "--scorer", "light.py", "--features", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["scorer"], found["spread"], found["alarms"]) == ("light", None, [])
    assert {"win_rate", "win_rate_low", "win_rate_high", "mean_a", "mean_b"} <= set(found)
    assert not (place / "base" / "features").exists()


def test_the_terminal_shows_alarms_first_then_a_table(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "base", "bright", "other", *BOTH]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ALARM          bright: light rises by +0.")
    assert "while dark falls by -0." in lines[0]
    assert lines[1].split()[:3] == ["folder", "scorer", "category"]
    table = lines[2 : 2 + 4 * 3]
    assert [row.split()[:3] for row in table[:5]] == [
        ["bright", "light", "(all)"],
        ["bright", "dark", "(all)"],
        ["other", "light", "(all)"],
        ["other", "dark", "(all)"],
        ["bright", "light", "anime"],
    ]
    assert table[0].endswith("better")
    assert "corrected for 12 results" in lines[14]
    assert [line.split()[:2] for line in lines[15:]] == [
        ["diversity", "bright:"],
        ["drift", "bright:"],
        ["diversity", "other:"],
        ["drift", "other:"],
    ]


def test_the_optimised_scorer_is_named(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "base", "bright", *BOTH, "--optimised", "dark", "--category", "photo"]) == 0
    printed = capsys.readouterr().out
    assert "ALARM" not in printed
    assert "category" not in printed.splitlines()[0]


def test_a_page_of_one_file(place: Path, capsys: pytest.CaptureFixture[str]):
    command = ["compare", "base", "bright", "other", *BOTH, "--gallery", "3", "--output", "out/page.html"]
    assert main(command) == 0
    page = Page(Path("out/page.html"))
    assert_self_contained(Path("out/page.html"))
    assert page.text.index("Alarm") < page.text.index("bright beats base") < page.text.index("Results")
    for text in ("bright, other against base", "Largest wins of bright", "Largest losses of other", "12 results"):
        assert text in page.text
    assert "Largest wins of base" not in page.text
    assert "Diversity and drift" in page.text
    cards = [attributes for tag, attributes in page.elements if tag == "figure" and "data-place" in attributes]
    assert len(cards) <= 5 * 3
    scores = [[float(score) for score in row.split(",")] for row in cards[0]["data-scores"].split(";")]
    assert [len(row) for row in scores] == [3, 3]
    assert scores[0] == [-score for score in scores[1]]
    assert {card["data-category"] for card in cards} == {"anime", "photo"}
    assert main(command) == 0, "a page of ours is written again"


def test_a_page_in_a_folder_shows_every_pair(place: Path, capsys: pytest.CaptureFixture[str]):
    for _ in range(2):  # the second time in place of the first
        assert main(["compare", "base", "bright", *BOTH, "--gallery", "3", "--output", "out/pages/"]) == 0
    page = Page(Path("out/pages/index.html"))
    files = {f"images/{file.name}" for file in Path("out/pages/images").iterdir()}
    assert {image["src"] for image in page.images()} == files
    assert all(image["loading"] == "lazy" for image in page.images())
    cards = [attributes for tag, attributes in page.elements if tag == "figure" and "data-place" in attributes]
    assert {card["data-place"] for card in cards} == {str(number) for number in range(24)}
    assert "All others" in page.text
    assert sorted(path.name for path in Path("out").iterdir()) == ["pages"]
    Path("out/pages/notes.txt").write_text("mine")
    assert "holds notes.txt beside a page" in fails(capsys, ["compare", "base", "bright", "--output", "out/pages"])
    first = Image.open(Path("out/pages") / page.images()[0]["src"])
    assert first.size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "name the folder of the base model's images and at least one other"),
        (["compare", "base", "base"], "base is named twice"),
        (["compare", "base", "bright", "--scorer", ","], "--scorer names no scorer"),
        (["compare", "base", "bright", "--scorer", "light.py,ligth"], "unknown scorer 'ligth'"),
        (["compare", "base", "bright", "--scorer", "light.py,light.py"], "two scorers of one name (light)"),
        (["compare", "base", "bright", "--scorer", "light.py", "--optimised", "lihgt"], "did you mean 'light'"),
        (["compare", "base", "bright", "--features", "clip"], "--features: unknown 'clip'"),
        (["compare", "base", "bright", "--category", "phot"], "did you mean 'photo'"),
        (["compare", "base", "bright", "--category", ""], "--category names no category"),
        (["compare", "base", "bright", "--largest-fall", "20"], "--largest-fall: 20.0 is not from 0 to 1"),
        (["compare", "base", "bright", "--gallery", "0"], "--gallery: 0 is not above 0"),
        (["compare", "base", "bright", "--output", "base"], "base exists and is no page of diffpref"),
        (["compare", "base", "bright", "--output", "mine.html"], "mine.html exists and is no page of diffpref"),
        (["compare", "base", "bright", "--output", "light.py"], "light.py is a file; a page is PAGE.html or a folder"),
        (["compare", "base", "bright", "--output", "dir.html"], "dir.html is a folder"),
    ],
)
def test_wrong_input_gives_one_line_and_loses_nothing(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    Path("mine.html").write_text("<p>mine</p>")
    Path("dir.html").mkdir()
    assert message in fails(capsys, arguments)
    assert Path("mine.html").read_text() == "<p>mine</p>"
    assert len(read_rows(place / "base")) == 24
    assert not (place / "base" / "scores").exists()
