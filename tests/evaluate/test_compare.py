"""Two folders compared: what pairs, what does not, and numbers that a hand can check."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.generated import Brightness, make_folder, read_rows, write_rows

from diffpref.errors import UserError
from diffpref.evaluate.compare import compare
from diffpref.evaluate.results import Result
from diffpref.evaluate.statistics import sign_test
from diffpref.scorers.base import Scorer, load_scorer


def grey_folder(folder: Path, brightness: list[float], per_prompt: int = 1) -> Path:
    folder.mkdir()
    rows = []
    for place, share in enumerate(brightness):
        Image.new("L", (4, 4), round(255 * share)).save(folder / f"{place}.png")
        prompt, index = divmod(place, per_prompt)
        rows.append({"file_name": f"{place}.png", "prompt": f"p{prompt}", "index": index, "seed": 10 + place})
    write_rows(folder, rows)
    return folder


def one(base: Path, tuned: Path, scorer: Scorer) -> Result:
    (result,) = compare([base, tuned], [scorer]).results
    return result


def test_the_numbers_are_the_second_folders_over_the_first(tmp_path: Path):
    base = grey_folder(tmp_path / "base", [0.0, 0.2, 0.4, 0.6, 0.8])
    tuned = grey_folder(tmp_path / "tuned", [0.2, 0.4, 0.6, 0.6, 0.6])
    comparison = compare([base, tuned], [Brightness()])
    (result,) = comparison.results
    assert (result.wins, result.losses, result.ties) == (3, 1, 1)
    assert result.win_rate == 0.7
    assert (result.mean_a, result.mean_b) == (pytest.approx(0.4), pytest.approx(0.48))
    assert result.mean_difference == pytest.approx(0.08)
    assert result.p_value == sign_test(3, 1)
    assert result.effect_size == pytest.approx(0.08 / np.std([0.2, 0.2, 0.2, 0, -0.2], ddof=1))
    assert (result.prompts, result.images, len(comparison.places)) == (5, 5, 5)
    assert result.win_rate_low <= result.win_rate <= result.win_rate_high
    assert comparison.differences() == pytest.approx([0.2, 0.2, 0.2, 0, -0.2])


def test_pairs_are_matched_by_prompt_and_index_not_by_order(tmp_path: Path):
    base = grey_folder(tmp_path / "base", [0.0, 0.2, 0.4, 0.6], per_prompt=2)
    tuned = grey_folder(tmp_path / "tuned", [0.2, 0.4, 0.6, 0.8], per_prompt=2)
    write_rows(tuned, read_rows(tuned)[::-1])
    comparison = compare([base, tuned], [Brightness()])
    (result,) = comparison.results
    assert (result.wins, result.prompts, result.images) == (4, 2, 4)
    assert all(place.files == (base / place.files[0].name, tuned / place.files[0].name) for place in comparison.places)
    assert comparison.differences() == pytest.approx([0.2] * 4)


def test_the_interval_takes_prompts_as_the_unit(tmp_path: Path):
    """Eight prompts, four of them won with all their images: the images of a prompt must not count as independent."""
    many = [0.6] * 16 + [0.4] * 16
    few = [0.6] * 4 + [0.4] * 4
    wide = one(
        grey_folder(tmp_path / "a", [0.5] * 32, per_prompt=4), grey_folder(tmp_path / "b", many, 4), Brightness()
    )
    same = one(grey_folder(tmp_path / "c", [0.5] * 8), grey_folder(tmp_path / "d", few), Brightness())
    assert (wide.win_rate_low, wide.win_rate_high) == (same.win_rate_low, same.win_rate_high)
    assert wide.p_value == same.p_value


def copied(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)


def drop_prompt(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["prompt"] != rows[0]["prompt"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_prompt, "tuned lacks the prompt 'a .*', which .*base has .2 such images"),
        (lambda rows: rows[1:], "tuned lacks image 0 of the prompt"),
        (lambda rows: [*rows, {**rows[0], "prompt": "other"}], "base lacks the prompt 'other'"),
        (lambda rows: [{**rows[0], "seed": 1}, *rows[1:]], "has seed .* in .*base and 1 in .*tuned"),
        (lambda rows: [{**rows[0], "seed": None}, *rows[1:]], "and None in .*tuned"),
        (lambda rows: [*rows, rows[0]], "line 9: a second image 0 of the prompt"),
    ],
)
def test_folders_that_do_not_pair(tmp_path: Path, change: Callable[[list[dict]], list[dict]], message: str):
    base = make_folder(tmp_path / "base", per_prompt=2)
    tuned = make_folder(tmp_path / "tuned", per_prompt=2)
    write_rows(tuned, change(read_rows(tuned)))
    with pytest.raises(UserError, match=message) as caught:
        compare([base, tuned], [Brightness()])
    assert "\n" not in str(caught.value)


def test_a_folder_against_its_copy_is_a_tie(tmp_path: Path):
    folder = make_folder(tmp_path / "images")
    result = one(folder, copied(folder, tmp_path / "same"), Brightness())
    assert (result.win_rate, result.ties, result.p_value, result.effect_size) == (0.5, 4, 1.0, 0.0)
    assert (result.win_rate_low, result.win_rate_high) == (0.5, 0.5)


def test_the_judge_prefers_the_cleaner_paintings(tmp_path: Path):
    base = make_folder(tmp_path / "base", clutter=0.8, prompts=30)
    tuned = make_folder(tmp_path / "tuned", clutter=0.1, prompts=30)
    result = one(base, tuned, load_scorer("embedded-judge"))
    assert result.win_rate_low > 0.5
    assert result.mean_b > result.mean_a
