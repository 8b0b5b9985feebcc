"""The judge against the painter: right on clean paintings of every composition, lower for each altered attribute."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffpref.embedded import world
from diffpref.embedded.judge import judge, measure


def picture(composition: world.Composition, seed: int, clutter: float = 0.0) -> Image.Image:
    return Image.fromarray(world.paint(composition, np.random.default_rng(seed), clutter))


def test_names_clean_paintings_of_every_composition():
    marks = [
        measure(picture(composition, 3 * number + t)).marks(composition.caption(t))
        for number, composition in enumerate(world.compositions())
        for t in range(len(world.TEMPLATES))
    ]
    assert len(marks) == 432 * 3
    for name in world.ATTRIBUTES:
        assert np.mean([mark[name] for mark in marks]) >= 0.99, name
    assert np.mean([mark["cleanness"] for mark in marks]) > 0.8


@pytest.mark.parametrize("name", world.ATTRIBUTES)
def test_each_altered_attribute_lowers_the_score(name):
    for number, composition in enumerate(world.compositions()):
        image = picture(composition, number)
        right = judge(image, composition.caption())
        for value in world.VALUES[name]:
            if value != getattr(composition, name):
                altered = replace(composition, **{name: value})
                assert judge(image, altered.caption()) == pytest.approx(right - 1 / 6), (composition, value)


def test_dirt_lowers_the_score():
    scores = []
    for clutter in (0.0, 0.5, 1.0):
        shown = world.compositions()[::10]
        scores.append(np.mean([measure(picture(c, i, clutter)).cleanness for i, c in enumerate(shown)]))
    assert scores[0] > scores[1] + 0.1 > scores[2] + 0.2


def test_an_empty_picture_shows_only_its_background():
    blank = Image.new("RGB", (32, 32), world.BACKGROUNDS["grey"])
    marks = measure(blank).marks("a small red circle on the left, grey background")
    assert marks == {"size": 0, "colour": 0, "shape": 0, "position": 0, "background": 1, "cleanness": 1}


def test_noise_scores_near_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert judge(Image.fromarray(noise), "a small red circle on the left, grey background") < 0.45


def test_reads_any_size():
    composition = world.compositions()[100]
    large = picture(composition, 0).resize((128, 128), Image.Resampling.NEAREST)
    assert judge(large, composition.caption()) == judge(picture(composition, 0), composition.caption())


def test_a_prompt_of_another_world_is_refused():
    with pytest.raises(ValueError, match="an astronaut"):
        judge(Image.new("RGB", (32, 32)), "an astronaut riding a horse")
