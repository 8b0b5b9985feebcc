"""Scorers are found by name, and the embedded judge is one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffpref.embedded import world
from diffpref.embedded.judge import judge
from diffpref.errors import UserError
from diffpref.scorers.base import Reward, UnscorableError, identity_of, load_scorer, scorer_names


def painting(place: int) -> tuple[Image.Image, str]:
    composition = world.compositions()[place]
    return Image.fromarray(world.paint(composition, np.random.default_rng(place))), composition.caption()


def test_the_judge_is_loaded_by_its_name():
    scorer = load_scorer("embedded-judge")
    assert (scorer.name, scorer.version) == ("embedded-judge", "1")
    assert "base" not in scorer_names()


@pytest.mark.parametrize("name", ["embeded-judge", "embedded_judge", "base", "../os", ""])
def test_an_unknown_name_is_refused_with_the_nearest(name: str):
    with pytest.raises(UserError, match="embedded-judge"):
        load_scorer(name)


def test_scores_are_the_judges_in_order():
    scorer = load_scorer("embedded-judge", device="cuda")
    (image, prompt), (other, _) = painting(7), painting(300)
    scores = scorer([image, other], [prompt, prompt])
    assert scores == [judge(image, prompt), judge(other, prompt)]
    assert scores[0] > 0.95 > scores[1]


def test_a_prompt_without_known_words_names_itself_and_its_place():
    scorer = load_scorer("embedded-judge")
    image, prompt = painting(0)
    with pytest.raises(UnscorableError, match="a nice day") as caught:
        scorer([image, image], [prompt, "a nice day"])
    assert caught.value.place == 1


def test_images_and_prompts_must_be_as_many():
    with pytest.raises(ValueError):
        load_scorer("embedded-judge")([painting(0)[0]], [])


@dataclass(frozen=True)
class Brightness:
    """Prepares an image as the mean of its pixels."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.tensor([np.asarray(image).mean() / 255])


def test_a_reward_prepares_each_image_and_measures_them_together():
    def measure(prepared: Sequence[torch.Tensor], prompts: Sequence[str]) -> torch.Tensor:
        return torch.cat(list(prepared)) * torch.tensor([float(len(prompt)) for prompt in prompts])

    reward = Reward("bright", {"weights": "none"}, Brightness(), measure)
    white, black = (Image.new("RGB", (4, 4), colour) for colour in ("white", "black"))
    assert reward([white, black], ["abc", "de"]) == [3.0, 0.0]
    assert reward([], []) == []
    assert reward.version != Reward("bright", {"weights": "other"}, Brightness(), measure).version
    assert identity_of(reward) == {"scorer": "bright", "version": reward.version, "weights": "none"}
    with pytest.raises(ValueError, match="1 images and 2 prompts"):
        reward([white], ["a", "b"])


def test_identity_of_a_scorer_that_tells_no_more():
    assert identity_of(load_scorer("embedded-judge")) == {"scorer": "embedded-judge", "version": "1"}


def test_weights_for_the_judge_are_refused():
    with pytest.raises(UserError, match=r"embedded-judge=weights\.pt: the embedded judge has no weights"):
        load_scorer("embedded-judge=weights.pt")


def test_a_function_in_a_python_file_is_a_scorer(tmp_path: Path):
    file = tmp_path / "length.py"
    file.write_text("def score(images, prompts):\n    return (len(prompt) for prompt in prompts)\n")
    scorer = load_scorer(str(file))
    image = Image.new("RGB", (4, 4))
    assert scorer([image, image], ["abc", "de"]) == [3.0, 2.0]
    assert scorer.name == "length"
    before = scorer.version
    file.write_text(file.read_text() + "# changed\n")
    assert load_scorer(str(file)).version != before
    file.write_text("def score(images, prompts):\n    return [1.0]\n")
    with pytest.raises(UserError, match=r"length\.py: score gives 1 numbers for 2 images"):
        load_scorer(str(file))([image, image], ["", ""])


def test_a_python_file_without_a_scorer_or_with_a_name_of_ours(tmp_path: Path):
    (tmp_path / "nothing.py").write_text("score = 3\n")
    with pytest.raises(UserError, match=r"no function load\(device\), and none score\(images, prompts\)"):
        load_scorer(str(tmp_path / "nothing.py"))
    (tmp_path / "pickscore.py").write_text("def score(images, prompts):\n    return []\n")
    with pytest.raises(UserError, match="would be called pickscore"):
        load_scorer(str(tmp_path / "pickscore.py"))


@pytest.mark.parametrize("name", scorer_names())
def test_every_scorer_has_its_row_in_the_docs(name: str):
    page = Path(__file__).parents[2] / "docs" / "scorers.md"
    assert f"| `{name}` |" in page.read_text(encoding="utf-8")
