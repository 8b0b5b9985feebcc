"""The describer: the painter's pictures are described rightly, and what cannot be named is left out."""

import numpy as np
import pytest
from PIL import Image

from diffpref.captioners.base import Captioner, CaptionOptions, load_captioner
from diffpref.embedded import describer, world
from diffpref.embedded.describer import Describer, describe
from diffpref.embedded.judge import Measurement


def test_clean_paintings_get_the_caption_that_they_were_painted_from():
    rng = np.random.default_rng(0)
    for composition in world.compositions():
        assert describe(Image.fromarray(world.paint(composition, rng))) == composition.caption()


def test_spoilt_ones_mostly_do():
    rng = np.random.default_rng(1)
    shown = [world.compositions()[i] for i in rng.integers(0, 432, 200)]
    right = [describe(Image.fromarray(world.paint(each, rng, clutter=0.5))) == each.caption() for each in shown]
    assert sum(right) > 160


def test_nothing_but_a_background():
    for name, colour in world.BACKGROUNDS.items():
        assert describe(Image.new("RGB", (32, 32), colour)) == f"{name} background"
    assert describe(Image.new("RGB", (32, 32), (0, 255, 0))) == ""


ALL = {"size": "large", "colour": "red", "shape": "circle", "position": "left", "background": "grey"}


@pytest.mark.parametrize(
    ("missing", "caption"),
    [
        ((), "a large red circle on the left, grey background"),
        (("shape",), "a large red on the left, grey background"),
        (("colour", "background"), "a large circle on the left"),
        (("colour", "shape"), "a large on the left, grey background"),
    ],
)
def test_what_cannot_be_named_is_left_out(monkeypatch, missing, caption):
    seen = {name: value for name, value in ALL.items() if name not in missing}
    monkeypatch.setattr(describer, "measure", lambda image: Measurement(seen, 1.0))
    assert describe(Image.new("RGB", (32, 32))) == caption
    assert world.read_caption(caption) == seen


def test_it_is_a_captioner_that_sees_no_prompt():
    image = Image.fromarray(world.paint(world.compositions()[5], np.random.default_rng(0)))
    describer = load_captioner(CaptionOptions("embedded"))
    assert isinstance(describer, Captioner) and describer == Describer()
    assert describer([image, image], ["a small blue cross", ""], [0, 1]) == [world.compositions()[5].caption()] * 2
