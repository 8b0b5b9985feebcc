"""Features, diversity and drift against hand values, a slow double loop, and the spread of repeated draws."""

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.clip import make_clip
from support.generated import make_folder, read_rows, write_rows
from transformers import CLIPModel

from diffpref.errors import UserError
from diffpref.evaluate import spread as module
from diffpref.evaluate.features import Pixels, features_of, load_features
from diffpref.evaluate.spread import spread
from diffpref.scorers.parts.pixels import ClipPixels


def flat(value: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def distance(a: Image.Image, b: Image.Image) -> float:
    first, second = Pixels()([a, b])
    return float(np.linalg.norm(first - second))


def test_pictures_of_one_colour_lie_as_far_apart_as_their_colours():
    assert distance(flat(0), flat(255)) == pytest.approx(1, abs=1e-6)
    assert distance(flat(51), flat(255)) == pytest.approx(0.8, abs=1e-6)
    assert distance(flat(0, (32, 32)), flat(0, (300, 200))) == 0
    red, black = Image.new("RGB", (64, 64), (255, 0, 0)), flat(0)
    assert distance(red, black) == pytest.approx(3**-0.5, abs=1e-6)


def test_an_edge_stands_in_its_tile_and_direction():
    """Black left, white right: at 64 pixels the slope is 1/2 in the two columns at the edge, which lie in two tiles."""
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, 32:] = 255
    (features,) = Pixels()([Image.fromarray(pixels)])
    edges = features[768:].reshape(4, 4, 8)
    expected = np.zeros((4, 4, 8))
    expected[:, 1:3, 0] = (0.5 * 16 / 256) ** 0.5 / 4  # 16 of a tile's 256 pixels; direction 0 is to the right
    assert edges == pytest.approx(expected, abs=1e-6)
    (turned,) = Pixels()([Image.fromarray(pixels.transpose(1, 0, 2).copy())])
    assert turned[768:].reshape(4, 4, 8)[1:3, :, 2] == pytest.approx(expected[:, 1:3, 0].T, abs=1e-6)
    (falling,) = Pixels()([Image.fromarray(255 - pixels)])
    assert falling[768:].reshape(4, 4, 8)[:, 1:3, 4] == pytest.approx(expected[:, 1:3, 0], abs=1e-6)


def test_diversity_is_the_mean_distance_within_a_prompt():
    a = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [9.0, 9.0]])
    b = np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    found = spread("made", "1", a, b, ["x", "x", "y", "y", "y", "single"])
    assert found.among == "prompt"
    assert found.diversity_a == pytest.approx((5 + (1 + 1 + 2) / 3) / 2)
    assert found.diversity_b == pytest.approx((1 + 4 / 3) / 2)
    assert found.diversity_difference is not None
    assert found.diversity_difference.value == pytest.approx(-2)
    assert found.diversity_change == pytest.approx(-2 / (5 / 2 + 2 / 3))
    assert found.drifts == pytest.approx([0, np.hypot(3, 3), 0, 0, 0, np.hypot(9, 9)], abs=1e-12)
    assert found.drift.value == pytest.approx(found.drifts.mean())
    assert found.drift.low <= found.drift.value <= found.drift.high


def test_with_one_image_a_prompt_it_is_the_distance_across_prompts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    a, b = np.random.default_rng(0).normal(size=(2, 30, 5)) + 100
    found = spread("made", "1", a.astype(np.float32), b.astype(np.float32), [str(place) for place in range(30)])
    slow = [np.mean([np.linalg.norm(x - y) for x, y in itertools.combinations(each, 2)]) for each in (a, b)]
    assert found.among == "prompts"
    assert (found.diversity_a, found.diversity_b) == pytest.approx(tuple(slow), rel=1e-5)


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_the_interval_of_diversity_is_as_wide_as_repeated_draws_differ(per_prompt: int):
    rng = np.random.default_rng(1)
    prompts = np.repeat([str(place) for place in range(30)], per_prompt).tolist()
    values, widths = [], []
    for _ in range(60):
        a, b = rng.normal(size=(2, len(prompts), 2))
        found = spread("made", "1", a, 0.8 * b, prompts).diversity_difference
        assert found is not None
        values.append(found.value)
        widths.append(found.high - found.low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.3)


def test_a_single_image_has_a_drift_and_no_diversity():
    found = spread("made", "1", np.zeros((1, 2)), np.array([[3.0, 4.0]]), ["x"])
    assert (found.diversity_a, found.diversity_difference, found.drift.value) == (None, None, 5)


def test_images_that_are_all_the_same_have_no_diversity_to_lose():
    found = spread("made", "1", np.ones((4, 3)), np.ones((4, 3)), list("abcd"))
    assert (found.diversity_a, found.diversity_change) == (0, None)
    assert found.summary()["drift"] == {"value": 0, "low": 0, "high": 0}


@dataclass(frozen=True)
class Counted:
    """Features that tell of each call."""

    version: str = "1"
    name: str = "counted"
    calls: list[int] = field(default_factory=list)

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        self.calls.append(len(images))
        return np.array([[np.asarray(image).mean(), 1] for image in images], dtype=np.float32)


def test_features_are_kept_until_images_list_or_version_change(tmp_path: Path):
    folder, features = make_folder(tmp_path / "images"), Counted()
    first = features_of(folder, features)
    assert len(first) == 4
    again = features_of(folder, features)
    assert features.calls == [4]
    assert all(np.array_equal(again[key], vector) for key, vector in first.items())

    image = folder / read_rows(folder)[0]["file_name"]
    flat(255, (32, 32)).save(image)
    later = (folder / "features" / "counted.safetensors").stat().st_mtime_ns + 10**9
    os.utime(image, ns=(later, later))
    changed = features_of(folder, features)
    assert features.calls == [4, 4]
    assert changed[read_rows(folder)[0]["prompt"], 0][0] == 255

    os.utime(image, ns=(0, 0))
    features_of(folder, features)
    write_rows(folder, read_rows(folder)[1:])
    assert len(features_of(folder, features)) == 3
    other = Counted(version="2")
    features_of(folder, other)
    assert (features.calls, other.calls) == ([4, 4, 3], [3])
    (folder / "features" / "counted.safetensors").write_bytes(b"broken")
    assert len(features_of(folder, other)) == 3


def test_a_clips_features_are_those_its_scorer_takes_the_cosine_of(tmp_path: Path):
    weights = make_clip(tmp_path / "clip")
    images = [flat(0), flat(255), Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))]
    features = load_features(f"clip-l={weights}")
    assert features is not None
    found = features(images)
    network = CLIPModel.from_pretrained(weights)
    pixels = torch.stack([ClipPixels("even", network.config.vision_config.image_size)(image) for image in images])
    with torch.no_grad():
        plain = network.visual_projection(network.vision_model(pixels).pooler_output)
    assert found == pytest.approx((plain / plain.norm(dim=-1, keepdim=True)).numpy(), abs=1e-5)
    assert features.version != load_features(f"clip-h={weights}").version
    with pytest.raises(UserError, match="pixels takes no weights"):
        load_features("pixels=here")


def test_unknown_features_are_refused_with_the_nearest_name():
    assert load_features("none") is None
    assert isinstance(load_features("pixels"), Pixels)
    with pytest.raises(UserError, match="did you mean 'pixels'"):
        load_features("pixel")
