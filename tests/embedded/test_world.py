"""The world: its compositions, captions and painter."""

import numpy as np
import pytest

from diffpref.embedded import world


def test_there_are_432_compositions():
    everything = world.compositions()
    assert len(set(everything)) == len(everything) == 2 * 6 * 4 * 3 * 3


def test_captions_are_read_back():
    captions = set()
    for composition in world.compositions():
        for template in range(len(world.TEMPLATES)):
            caption = composition.caption(template)
            captions.add(caption)
            assert world.read_caption(caption) == vars(composition)
    assert len(captions) == 432 * len(world.TEMPLATES)


def test_painting_is_a_function_of_its_generator():
    composition = world.compositions()[7]
    first, again = (world.paint(composition, np.random.default_rng(1), 0.5) for _ in range(2))
    assert first.dtype == np.uint8 and first.shape == (32, 32, 3)
    assert (first == again).all()
    assert (first != world.paint(composition, np.random.default_rng(2), 0.5)).any()


@pytest.mark.parametrize(
    ("shape", "area"),  # of the box of side 2: closed forms
    [("circle", np.pi), ("square", 4.0), ("triangle", 2.0), ("cross", 4 * 0.38 * 2 - 4 * 0.38**2)],
)
def test_shapes_cover_their_area(shape, area):
    half = 9.0
    cover = world.coverage(shape, 16.3, 15.8, half)
    assert cover.sum() == pytest.approx(area * half**2, rel=0.03)


def test_careless_captions_change_attributes_at_their_rate():
    rng = np.random.default_rng(0)
    composition = world.compositions()[0]
    drawn = [world.miscaptioned(composition, 0.4, rng) for _ in range(4000)]
    for name, values in world.VALUES.items():
        kept = np.mean([getattr(d, name) == getattr(composition, name) for d in drawn])
        assert kept == pytest.approx(0.6 + 0.4 / len(values), abs=0.03), name


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="hexagon"):
        world.coverage("hexagon", 0, 0, 1)
