"""Images become a network's input exactly as the published code does it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.openclip import SIZES, picture, wave
from transformers import CLIPImageProcessorPil

from diffpref.scorers.parts.pixels import MEAN, STD, ClipPixels, PaddedPixels

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "openclip.json").read_text(encoding="utf-8"))
KINDS = {"even": ClipPixels("even"), "padded": PaddedPixels()}


@pytest.mark.parametrize("case", GOLDEN["pixels"], ids=lambda case: f"{case['kind']}-{case['size']}")
def test_golden_numbers_of_the_official_transforms(case: dict[str, Any]):
    pixels = KINDS[case["kind"]](picture(*case["size"]))
    if case["shape"] != [3, 224, 224]:  # HPSv2's leaves an image of the right longer side unfilled
        assert case["size"] == [31, 224]
        pixels = pixels[:, :, 96:127]
    assert list(pixels.shape) == case["shape"]
    sample = pixels[:, :: GOLDEN["stride"], :: GOLDEN["stride"]].flatten().tolist()
    assert sample == pytest.approx(case["sample"], abs=1e-6)
    sums = [float((pixels.double() * wave(tuple(pixels.shape), place)).sum()) for place in (1, 2)]
    assert sums == pytest.approx(case["sums"], abs=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_clip_pixels_are_those_of_transformers(size: tuple[int, int]):
    image = picture(*size)
    theirs = CLIPImageProcessorPil()(images=image, return_tensors="pt")["pixel_values"][0]
    assert ClipPixels("floor")(image) == pytest.approx(theirs, abs=1e-6)


def test_half_a_pixel_goes_to_the_even_side_with_torchvision():
    image = picture(227, 224)  # 1.5 pixels on each side
    floor, even = ClipPixels("floor")(image), ClipPixels("even")(image)
    assert torch.equal(floor[:, :, 1:], even[:, :, :-1])
    square = picture(300, 300)
    assert torch.equal(ClipPixels("floor")(square), ClipPixels("even")(square))


@pytest.mark.parametrize("size", [(448, 224), (224, 448), (224, 100), (7, 300), (1, 500)])
def test_padded_pixels_hold_the_whole_image_on_black(size: tuple[int, int]):
    white = PaddedPixels()(Image.new("RGB", size, "white"))
    lit, dark = ((torch.tensor([value] * 3) - torch.tensor(MEAN)) / torch.tensor(STD) for value in (1.0, 0.0))
    share = [max(1, round(side * 224 / max(size))) for side in size]
    left, top = (224 - share[0]) // 2, (224 - share[1]) // 2
    expected = dark[:, None, None].repeat(1, 224, 224)
    expected[:, top : top + share[1], left : left + share[0]] = lit[:, None, None]
    assert white == pytest.approx(expected, abs=1e-5)


def test_the_padded_resize_is_not_clamped():
    pixels = PaddedPixels()(picture(500, 500)) * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert pixels.max() > 1.01
    assert pixels.min() < -0.01


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_other_modes_are_made_rgb(mode: str):
    image = picture(64, 48).convert(mode)
    for prepare in (ClipPixels("floor", size=28), PaddedPixels(size=28)):
        assert torch.equal(prepare(image), prepare(image.convert("RGB")))
        assert prepare(image).shape == (3, 28, 28)


def test_equal_records_do_the_same_and_others_are_not_equal():
    assert ClipPixels("floor") == ClipPixels("floor") != ClipPixels("even")
    assert len({ClipPixels("floor"), ClipPixels("floor"), ClipPixels("floor", size=336), PaddedPixels()}) == 3
    assert len({str(ClipPixels("floor")), str(ClipPixels("even")), str(PaddedPixels())}) == 3
