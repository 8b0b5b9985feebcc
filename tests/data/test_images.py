import warnings

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from support.datasets import bomb, encoded, jpeg, noise, truncated_jpeg

from diffpref.data.images import TURNS, BadImage, decode

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(kind):
    image = decode(encoded(noise(1), kind))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(pixels(image), pixels(noise(1)))


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True}), ("GIF", {})])
def test_other_formats_come_back_in_rgb(kind, options):
    flat = Image.new("RGB", (20, 10), (200, 30, 60))
    image = decode(encoded(flat, kind, **options))
    assert (image.mode, image.size) == ("RGB", (20, 10))
    np.testing.assert_allclose(pixels(image).astype(int), pixels(flat).astype(int), atol=3)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    image = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind))  # no cyan: red
    assert image.mode == "RGB"
    np.testing.assert_allclose(pixels(image)[4, 4].astype(int), RED, atol=4)


def test_alpha_is_laid_on_white():
    source = Image.new("RGBA", (2, 1))
    source.putpixel((0, 0), (255, 0, 0, 255))
    source.putpixel((1, 0), (0, 0, 0, 51))  # a fifth of black over white
    image = decode(encoded(source))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [RED, (204, 204, 204)]


def test_transparency_of_palettes_grey_and_rgb_is_laid_on_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert decode(encoded(palette, transparency=1)).getpixel((1, 0)) == WHITE
    assert decode(encoded(palette)).getpixel((1, 0)) == BLACK
    assert decode(encoded(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == WHITE
    assert decode(encoded(Image.new("RGB", (1, 1)), transparency=(0, 0, 0))).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    image = decode(encoded(Image.fromarray(values), kind))
    np.testing.assert_array_equal(pixels(image)[0, :, 0], [0, 100, 255])


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_pixels_without_a_plain_meaning_are_refused(mode):
    with pytest.raises(BadImage) as caught:
        decode(encoded(Image.new(mode, (4, 4)), "TIFF"))
    assert caught.value.reason == "unsupported_mode"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, *TURNS])
def test_exif_orientation_is_applied_once(kind, orientation):
    """The picture is stored turned back; what comes out is the picture as it was meant."""
    meant = Image.new("RGB", (48, 32), WHITE)
    meant.paste(RED, (0, 0, 16, 16))
    meant.paste(BLACK, (32, 0, 48, 16))
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}.get(orientation, TURNS.get(orientation))
    stored = meant if back is None else meant.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    image = decode(encoded(stored, kind, exif=exif, **options))
    assert image.size == (48, 32)
    np.testing.assert_allclose(pixels(image).astype(int), pixels(meant).astype(int), atol=4)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_beside_good_pixels_is_no_fault():
    image = decode(encoded(noise(3), "PNG", exif=b"Exif\0\0MM\0*broken"))
    np.testing.assert_array_equal(pixels(image), pixels(noise(3)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLACK)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data).getpixel((4, 4)) == RED


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not_an_image"),
        (jpeg(0)[:2], "not_an_image"),
        (truncated_jpeg(), "truncated"),
        (encoded(noise(0), "PNG")[:300], "truncated"),
        (encoded(noise(0), "GIF")[:-200], "truncated"),
        (encoded(noise(0), "BMP")[:-200], "truncated"),
        (encoded(noise(0), "WEBP")[:-200], "corrupt"),
        (jpeg(0)[:20], "corrupt"),
        (b"BM" + bytes(100), "corrupt"),
        (bomb(), "too_large"),
    ],
)
def test_bad_bytes_have_a_reason(data, reason):
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.reason == reason
    assert str(caught.value)


def test_formats_outside_the_list_are_no_images():
    for kind in ("PPM", "ICO", "EPS"):
        with pytest.raises(BadImage) as caught:
            decode(encoded(Image.new("RGB", (16, 16)), kind))
        assert caught.value.reason == "not_an_image"


def test_pixel_limit_stands_at_its_edge():
    data = encoded(Image.new("RGB", (20, 10)))
    assert decode(data, max_pixels=200).size == (20, 10)
    with pytest.raises(BadImage, match="20 x 10 pixels") as caught:
        decode(data, max_pixels=199)
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize("side", [10_000, 14_000, 50_000])  # PIL itself warns from 9,460 on and raises from 13,378 on
def test_a_bomb_is_refused_by_its_header_without_a_warning(side, monkeypatch):
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=f"{side} x {side} pixels, more than 64 million"):
            decode(bomb(side))


def test_a_raised_limit_is_not_bounded_by_pils_own(monkeypatch):
    def load(self):
        raise OSError("the pixels are wanted")

    monkeypatch.setattr(PngImageFile, "load", load)
    with pytest.raises(BadImage, match="the pixels are wanted"):
        decode(bomb(14_000), max_pixels=200_000_000)
