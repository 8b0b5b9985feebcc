"""Scorers are found by name, and the embedded judge is one."""

import numpy as np
import pytest
from PIL import Image

from diffpref.embedded import world
from diffpref.embedded.judge import judge
from diffpref.errors import UserError
from diffpref.scorers.base import UnscorableError, load_scorer, scorer_names


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
