"""Two folders compared: what pairs, what does not, and numbers that a hand can check."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.generated import Brightness, make_folder, read_rows, write_rows

from diffpref.errors import UserError
from diffpref.evaluate.compare import compare
from diffpref.evaluate.features import Pixels
from diffpref.evaluate.pairing import Place
from diffpref.evaluate.results import Result, corrected, results_of
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


@dataclass(frozen=True)
class Darkness:
    """The opposite of brightness."""

    name: str = "darkness"
    version: str = "2"

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [-value for value in Brightness()(images, prompts)]


def test_each_folder_is_compared_with_the_first_by_each_scorer(tmp_path: Path):
    base = grey_folder(tmp_path / "base", [0.2, 0.4, 0.6, 0.8])
    up = grey_folder(tmp_path / "up", [0.4, 0.6, 0.8, 1.0])
    mixed = grey_folder(tmp_path / "mixed", [0.0, 0.2, 0.6, 1.0])
    found = compare([base, up, mixed], [Brightness(), Darkness()])
    assert found.names == ("base", "up", "mixed")
    assert [(each.folder_b, each.scorer, each.version) for each in found.results] == [
        (up, "brightness", "1"),
        (up, "darkness", "2"),
        (mixed, "brightness", "1"),
        (mixed, "darkness", "2"),
    ]
    assert [each.win_rate for each in found.results] == [1.0, 0.0, 0.375, 0.625]
    assert {each.folder_a for each in found.results} == {base}
    assert found.values.shape == (2, 3, 4)
    alone = compare([base, mixed], [Darkness()]).results[0]
    assert replace(found.results[3], p_holm=0, p_fdr=0) == replace(alone, p_holm=0, p_fdr=0)


def with_categories(folder: Path, categories: list[str | None]) -> Path:
    rows = zip(read_rows(folder), categories, strict=True)
    write_rows(folder, [{**row, "category": category} for row, category in rows])
    return folder


def test_categories_and_their_correction(tmp_path: Path):
    """16 prompts of `good` won, 16 of `bad` lost, one of none: the p-values are corrected for all three results."""
    base = grey_folder(tmp_path / "base", [0.5] * 33)
    tuned = grey_folder(tmp_path / "tuned", [0.6] * 16 + [0.4] * 16 + [0.6])
    with_categories(tuned, ["good"] * 16 + ["bad"] * 16 + [None])
    found = compare([base, tuned], [Brightness()])
    assert [(each.category, each.win_rate, each.images) for each in found.by_category] == [
        ("bad", 0.0, 16),
        ("good", 1.0, 16),
    ]
    (whole,) = found.results
    assert (whole.category, whole.wins, whole.losses) == (None, 17, 16)
    assert [each.p_value for each in found.by_category] == [2 / 2**16] * 2
    assert [each.p_holm for each in found.by_category] == [3 * 2 / 2**16] * 2
    assert [each.p_fdr for each in found.by_category] == pytest.approx([1.5 * 2 / 2**16] * 2)
    assert [each.verdict for each in (whole, *found.by_category)] == ["no clear difference", "worse", "better"]

    (good,) = compare([base, tuned], [Brightness()], categories=["good"]).results
    assert (good.win_rate, good.images, good.p_holm) == (1.0, 16, good.p_value)
    assert compare([base, tuned], [Brightness()], categories=["good"]).by_category == ()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["photo"], "known: anime, paintings"),
        (["painting"], "did you mean 'paintings'"),
        (["anime", "x"], "category x"),
    ],
)
def test_a_category_that_no_prompt_has_is_refused(tmp_path: Path, wanted: list[str], message: str):
    folders = [with_categories(make_folder(tmp_path / name), ["anime", "paintings"] * 2) for name in "ab"]
    with pytest.raises(UserError, match=message):
        compare(folders, [Brightness()], categories=wanted)


def test_categories_of_two_folders_must_agree(tmp_path: Path):
    folders = [make_folder(tmp_path / name) for name in "ab"]
    with pytest.raises(UserError, match="--category anime: no image has a category"):
        compare(folders, [Brightness()], categories=["anime"])
    with_categories(folders[0], ["anime"] * 4)
    assert {place.category for place in compare(folders, [Brightness()]).places} == {"anime"}
    with_categories(folders[1], ["anime", "anime", "photo", "anime"])
    with pytest.raises(UserError, match=r"b/metadata.jsonl line 3: the category is 'photo', but 'anime' in .*a/meta"):
        compare(folders, [Brightness()])
    with_categories(folders[1], ["anime", "anime", 3, "anime"])
    with pytest.raises(UserError, match="line 3: no category"):
        compare(folders, [Brightness()])


def test_folders_of_one_name_are_told_apart_by_what_stands_before_it(tmp_path: Path):
    folders = [make_folder(tmp_path / name) for name in ("one/images", "two/images", "two/more")]
    assert compare(folders, [Brightness()]).names == ("one/images", "two/images", "two/more")
    with pytest.raises(UserError, match="images is named twice"):
        compare([folders[0], folders[1], tmp_path / "one" / ".." / "one" / "images"], [Brightness()])


def test_scorers_of_one_name_and_an_unknown_optimised_one_are_refused(tmp_path: Path):
    folders = [make_folder(tmp_path / name) for name in "ab"]
    with pytest.raises(UserError, match="two scorers of one name"):
        compare(folders, [Brightness(), Brightness()])
    with pytest.raises(UserError, match=r"--optimised brightnes: .* did you mean 'brightness'"):
        compare(folders, [Brightness()], optimised="brightnes")


def test_folders_that_do_not_pair_are_refused_before_they_are_scored(tmp_path: Path):
    base, tuned = make_folder(tmp_path / "a"), make_folder(tmp_path / "b", prompts=5)
    scorer = Brightness()
    with pytest.raises(UserError, match="do not pair"):
        compare([base, tuned], [scorer])
    assert scorer.batches == []


def test_alarms_come_from_the_folders_they_ring_for(tmp_path: Path):
    """Brighter is darker's loss; the third folder is as the base but for a diversity that is gone."""
    rng = np.random.default_rng(0)
    values = (0.2 + 0.5 * rng.random(40)).tolist()
    base = grey_folder(tmp_path / "base", values, per_prompt=2)
    brighter = grey_folder(tmp_path / "brighter", [value + 0.2 for value in values], per_prompt=2)
    means = np.repeat(np.reshape(values, (20, 2)).mean(axis=1), 2)
    same = grey_folder(tmp_path / "same", means.tolist(), per_prompt=2)
    found = compare([base, brighter, same], [Darkness(), Brightness()], Pixels(), optimised="brightness")
    assert [(alarm.kind, alarm.folder) for alarm in found.alarms] == [
        ("held_out_falls", brighter),
        ("diversity_falls", same),
    ]
    assert [len(each["alarms"]) for each in found.summaries()] == [1, 1, 1, 1]
    assert compare([base, brighter, same], [Darkness(), Brightness()], optimised="darkness").alarms == ()
    kinds = [alarm.kind for alarm in compare([base, brighter], [Brightness(), Darkness()], Pixels()).alarms]
    assert kinds == ["held_out_falls"]  # the first scorer is the optimised one if none is named


def test_spreads_are_measured_at_the_same_places(tmp_path: Path):
    base = grey_folder(tmp_path / "base", [0.0, 1.0, 0.2, 0.4], per_prompt=2)
    tuned = grey_folder(tmp_path / "tuned", [0.0, 0.8, 0.4, 0.8], per_prompt=2)
    write_rows(tuned, read_rows(tuned)[::-1])
    (found,) = compare([base, tuned], [Brightness()], Pixels()).spreads
    assert found.drifts == pytest.approx([0, 0.2, 0.2, 0.4], abs=1e-6)
    assert (found.diversity_a, found.diversity_b) == pytest.approx((0.6, 0.6), abs=1e-6)


def test_of_two_folders_of_one_model_it_says_no_difference():
    """100 repetitions; prompts differ much, and the four images of each share what the prompt does."""
    rng = np.random.default_rng(0)
    folders = (Path("a"), Path("b"))
    places = [Place(str(place // 4), place % 4, None, None, folders) for place in range(160)]
    said = []
    for _ in range(100):
        prompt = np.repeat(rng.normal(size=40), 4)
        values = prompt + 0.5 * np.repeat(rng.normal(size=(1, 2, 40)), 4, axis=2) + rng.normal(size=(1, 2, 160))
        said += [result.verdict for result in corrected(results_of(folders, [Brightness()], places, values))]
    assert said.count("no clear difference") >= 93
    shifted = values + np.array([0, 0.9])[None, :, None]
    assert corrected(results_of(folders, [Brightness()], places, shifted))[0].verdict == "better"
