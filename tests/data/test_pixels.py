"""Resize and crop: torchvision's documented Resize and CenterCrop, computed here on its own, and hand values."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from support.datasets import noise

from diffpref.data.images import BadImage
from diffpref.data.pixels import to_pixels

SIZES = [(64, 64), (32, 32), (31, 31), (100, 37), (37, 100), (33, 32), (32, 33), (65, 48), (47, 48), (500, 33), (5, 7)]


def resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
    """In [-1, 1]: the short side to `size`, the long one to int(size * long / short), cropped in the middle."""
    short, long = sorted(image.size)
    new_long = int(size * long / short)
    width, height = (new_long, size) if image.width > image.height else (size, new_long)
    array = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    square = array[top : top + size, left : left + size]
    return ((square / 255 - 0.5) / 0.5).transpose(2, 0, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_centre_is_torchvisions_resize_and_crop(size):
    image = noise(1, *size)
    pixels = to_pixels(image, (32, 32), "center")
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 32, 32) and pixels.is_contiguous()
    np.testing.assert_allclose(pixels.numpy(), resize_and_crop(image, 32), atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_none_squeezes_the_whole_picture(size):
    image = noise(2, *size)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float64).transpose(2, 0, 1)
    np.testing.assert_allclose(to_pixels(image, (32, 32), "none").numpy(), expected / 127.5 - 1, atol=1e-6)


def test_values_by_hand():
    image = Image.new("RGB", (2, 2), (0, 255, 51))
    image.putpixel((1, 0), (255, 0, 102))
    pixels = to_pixels(image, (2, 2), "center")
    assert pixels[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
    assert pixels[:, 0, 1].tolist() == pytest.approx([1, -1, -0.2])  # row 0, column 1: x is the last axis


def test_the_crop_keeps_the_middle():
    image = Image.new("RGB", (6, 2), (0, 0, 0))
    image.paste((255, 255, 255), (2, 0, 4, 2))
    assert to_pixels(image, (2, 2), "center").min() == 1.0
    assert to_pixels(image.transpose(Image.Transpose.ROTATE_90), (2, 2), "center").min() == 1.0


def test_an_odd_remainder_is_cut_as_torchvision_cuts_it():
    # 5 wide, 2 high: (5 - 2) / 2 = 1.5 rounds to the even 2; 3 wide: 0.5 rounds to 0
    image = Image.new("RGB", (5, 2))
    for x in range(5):
        image.paste((50 * x, 0, 0), (x, 0, x + 1, 2))
    assert ((to_pixels(image, (2, 2), "center")[0, 0] + 1) * 127.5).round().tolist() == [100, 150]
    assert ((to_pixels(image.crop((0, 0, 3, 2)), (2, 2), "center")[0, 0] + 1) * 127.5).round().tolist() == [0, 50]


def test_shrinking_averages_instead_of_skipping():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    inner = to_pixels(Image.fromarray(stripes), (16, 16), "center")[:, :, 2:-2]
    assert inner.abs().max() < 0.1  # grey


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (331, 10)])
def test_a_strip_is_refused_before_it_fills_the_memory(size):
    with pytest.raises(BadImage, match=f"{size[0]} x {size[1]} pixels, one side over 32 times the other"):
        to_pixels(noise(0, *size), (512, 512), "center")
    assert to_pixels(noise(0, 320, 10), (16, 16), "center").shape == (3, 16, 16)


def test_a_random_crop_is_a_square_of_the_resized_picture_at_its_place():
    image = noise(4, 40, 16)  # the short side has the resolution already: 25 squares lie side by side
    whole = np.asarray(image, dtype=np.float32) / 127.5 - 1
    for left, x in ((0.0, 0), (0.039, 0), (0.041, 1), (0.5, 12), (0.999999, 24)):
        pixels = to_pixels(image, (16, 16), "random", left, 0.7)
        np.testing.assert_allclose(pixels.numpy(), whole[:, x : x + 16].transpose(2, 0, 1), atol=1e-6)
    upright = to_pixels(image.transpose(Image.Transpose.ROTATE_90), (16, 16), "random", 0.3, 0.999999)
    assert torch.equal(
        upright, to_pixels(image.crop((0, 0, 16, 16)).transpose(Image.Transpose.ROTATE_90), (16, 16), "center")
    )


def test_a_random_crop_shrinks_first():
    image = noise(5, 100, 50)
    small = image.resize((64, 32), Image.Resampling.BILINEAR)
    assert torch.equal(
        to_pixels(image, (32, 32), "random", 0.5, 0.5), to_pixels(small.crop((16, 0, 48, 32)), (32, 32), "center")
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bucket", [(40, 24), (24, 40)], ids=str)
def test_a_rectangle_is_covered_and_its_middle_kept(size, bucket):
    """Computed with the exact scale: the smallest at which both sides reach the bucket's."""
    image, (width, height) = noise(6, *size), bucket
    scale = max(Fraction(width, size[0]), Fraction(height, size[1]))
    large = image.resize((math.floor(size[0] * scale), math.floor(size[1] * scale)), Image.Resampling.BILINEAR)
    assert large.width == width or large.height == height
    array = np.asarray(large, dtype=np.float64)
    top, left = round((large.height - height) / 2), round((large.width - width) / 2)
    expected = array[top : top + height, left : left + width].transpose(2, 0, 1) / 127.5 - 1
    pixels = to_pixels(image, bucket, "center")
    assert pixels.shape == (3, height, width)
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)
    squeezed = np.asarray(image.resize(bucket, Image.Resampling.BILINEAR), dtype=np.float64)
    found = to_pixels(image, bucket, "none").numpy()
    np.testing.assert_allclose(found, squeezed.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_a_random_rectangle_lies_at_its_place():
    image = noise(7, 40, 30)  # as wide as the bucket: 15 rectangles of 16 rows lie below one another
    whole = np.asarray(image, dtype=np.float32) / 127.5 - 1
    for top, y in ((0.0, 0), (0.5, 7), (0.999999, 14)):
        pixels = to_pixels(image, (40, 16), "random", 0.9, top)
        np.testing.assert_allclose(pixels.numpy(), whole[y : y + 16].transpose(2, 0, 1), atol=1e-6)


def test_all_places_of_a_random_crop_are_equally_likely():
    image = Image.fromarray(np.repeat(np.arange(20, dtype=np.uint8)[None, :, None], 16, axis=0).repeat(3, axis=2))
    lefts = [
        round((to_pixels(image, (16, 16), "random", n / 500, 0.0)[0, 0, 0].item() + 1) * 127.5) for n in range(500)
    ]
    assert [lefts.count(place) for place in range(5)] == [100] * 5
