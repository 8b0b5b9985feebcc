"""The page holds all that it shows, asks for nothing, and takes no text of the data for markup."""

import base64
import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.generated import Brightness, make_folder, make_run, read_rows, write_rows
from support.pages import NASTY, Page, assert_self_contained

from diffpref.errors import UserError
from diffpref.evaluate.alarms import Alarm
from diffpref.evaluate.compare import Comparison, compare
from diffpref.evaluate.features import Pixels
from diffpref.report.gallery import choices
from diffpref.report.page import write_report


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    base = make_folder(tmp_path / "base", clutter=0.8, prompts=20)
    tuned = make_folder(tmp_path / "tuned", clutter=0.2, prompts=20)
    return compare([base, tuned], [Brightness()])


def with_prompt(folder: Path, prompt: str) -> Path:
    rows = read_rows(folder)
    write_rows(folder, [{**rows[0], "prompt": prompt}, *rows[1:]])
    return folder


def written(output: Path, run: Path | None, comparison: Comparison | None, title: str = "A title") -> Page:
    write_report(output, title=title, run=run, comparison=comparison, reproduce=["diffpref demo --seed 0"])
    return Page(output)


def test_a_full_report_has_every_part(tmp_path: Path, comparison: Comparison):
    page = written(tmp_path / "out" / "report.html", make_run(tmp_path / "run", 40), comparison)
    (result,) = comparison.results
    for text in (
        "A title",
        f"{result.win_rate:.1%}",
        f"95% interval {result.win_rate_low:.1%} to {result.win_rate_high:.1%}",
        f"{result.mean_a:.3f}",
        f"{result.mean_b:.3f}",
        "Random",
        "Largest wins",
        "Largest losses",
        "Loss",
        "Implicit accuracy",
        "Reward margin",
        "Held-out accuracy",
        "Prediction errors",
        "log 2",
        "learning_rate: 1.0e-05",
        "diffpref demo --seed 0",
    ):
        assert text in page.text, text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_the_page_is_self_contained(tmp_path: Path, comparison: Comparison):
    written(tmp_path / "report.html", make_run(tmp_path / "run", 40), comparison)
    assert_self_contained(tmp_path / "report.html")


def test_images_are_the_folders_images(tmp_path: Path, comparison: Comparison):
    page = written(tmp_path / "report.html", None, comparison)
    source = page.images()[0]["src"]
    assert source is not None
    shown = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    original = Image.open(comparison.places[choices(comparison, 8)[0].places[0]].files[0])
    assert np.array_equal(np.asarray(shown), np.asarray(original))
    assert all(image.get("class") == "crisp" for image in page.images())


def test_a_large_image_is_reduced_and_not_enlarged_by_pixels(tmp_path: Path):
    folder = make_folder(tmp_path / "images", prompts=1)
    Image.new("RGB", (1024, 512)).save(folder / read_rows(folder)[0]["file_name"])
    same = shutil.copytree(folder, tmp_path / "same")
    image = written(tmp_path / "report.html", None, compare([folder, same], [Brightness()])).images()[0]
    assert (image["width"], image["height"]) == ("512", "256")
    assert "class" not in image


def test_text_of_the_data_is_never_markup(tmp_path: Path):
    base = with_prompt(make_folder(tmp_path / "base", prompts=2), NASTY)
    tuned = with_prompt(make_folder(tmp_path / "tuned", prompts=2), NASTY)
    run = make_run(tmp_path / "run", 5)
    (run / "config.yaml").write_text(NASTY)
    (run / "environment.json").write_text(NASTY)
    for folder in (base, tuned):
        write_rows(folder, [{**row, "category": f"{NASTY}{place}"} for place, row in enumerate(read_rows(folder))])
    comparison = compare([base, tuned], [Brightness()], Pixels())
    result = replace(comparison.results[0], folder_a=Path(NASTY), scorer=NASTY)
    comparison = replace(
        comparison,
        results=(result,),
        scorers=(NASTY,),
        alarms=(Alarm("held_out_falls", tuned, NASTY),),
        spreads=(replace(comparison.spreads[0], features=NASTY),),
        names=(f"{NASTY}a", f"{NASTY}b"),
    )
    page = written(tmp_path / "report.html", run, comparison, title=NASTY)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert page.text.count(NASTY) >= 15
    assert f"base: {NASTY}" in {image["alt"] for image in page.images()}
    assert len([tag for tag, _ in page.elements if tag == "title"]) > 1  # the page's and its charts', all closed


def test_a_tie_is_neither_a_win_nor_a_loss(tmp_path: Path):
    folder = make_folder(tmp_path / "images")
    same = shutil.copytree(folder, tmp_path / "same")
    drawn, wins, losses = choices(compare([folder, same], [Brightness()]), 8)
    assert (len(drawn.places), wins.places, losses.places) == (4, [], [])
    assert "No pair was lost" in losses.how


def test_the_gallery_is_chosen_as_it_says(comparison: Comparison):
    drawn, wins, losses = choices(comparison, 4)
    differences = comparison.differences().tolist()
    by_difference = sorted(differences, reverse=True)
    assert [differences[place] for place in wins.places] == [value for value in by_difference if value > 0][:4]
    assert [differences[place] for place in losses.places] == [value for value in by_difference[::-1] if value < 0][:4]
    assert len(drawn.places) == 4
    assert choices(comparison, 4) == choices(comparison, 4)
    flipped = choices(replace(comparison, values=comparison.values[:, ::-1]), 4)
    assert [choice.places for choice in flipped] == [drawn.places, losses.places, wins.places]


@pytest.mark.parametrize(
    ("low", "high", "p_value", "said"),
    [
        (0.51, 0.7, 0.01, "The tuned model beats"),
        (0.3, 0.49, 0.01, "The tuned model loses"),
        (0.49, 0.7, 0.01, "No clear difference"),
        (0.51, 0.7, 0.06, "No clear difference"),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(
    tmp_path: Path, comparison: Comparison, low: float, high: float, p_value: float, said: str
):
    middle = (low + high) / 2
    result = replace(
        comparison.results[0], win_rate=middle, win_rate_low=low, win_rate_high=high, p_holm=p_value, p_value=0.0
    )
    assert said in written(tmp_path / "report.html", None, replace(comparison, results=(result,))).text


def test_a_report_of_training_alone_shows_samples_and_curves(tmp_path: Path):
    page = written(tmp_path / "report.html", make_run(tmp_path / "run", 40), None)
    assert "step-40" in page.text
    assert len(page.images()) == 6
    assert "Win rate" not in page.text
    assert "Implicit accuracy" in page.text


def test_a_run_without_preferences_shows_what_it_logged(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.05}\n')
    page = written(tmp_path / "report.html", run, None)
    assert "Loss" in page.text
    assert "log 2" not in page.text
    assert "Reward margin" not in page.text
    assert "no config.yaml" in page.text


def test_an_empty_run_still_gives_a_page(tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert "logged no metrics" in written(tmp_path / "report.html", tmp_path / "run", None).text


def break_image(comparison: Comparison) -> None:
    for place in comparison.places:
        place.files[1].write_bytes(b"broken")


def remove_images(comparison: Comparison) -> None:
    for place in comparison.places:
        place.files[1].unlink()


@pytest.mark.parametrize("spoil", [break_image, remove_images])
def test_an_unreadable_image_leaves_no_page(
    tmp_path: Path, comparison: Comparison, spoil: Callable[[Comparison], None]
):
    spoil(comparison)
    with pytest.raises(UserError, match=r"\.png"):
        written(tmp_path / "report.html", None, comparison)
    assert not (tmp_path / "report.html").exists()
