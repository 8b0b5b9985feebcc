import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from support.datasets import bomb, encoded, jpeg, noise, truncated_jpeg
from support.fuzzing import mutated

from diffpref.data.images import REASONS, TURNS, BadImage, decode, open_picture

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


def webp_canvas(side: int) -> bytes:
    """A WEBP animation of a hundred bytes whose header announces a canvas of `side` x `side` pixels."""
    small = encoded(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    corner, size, time = bytes(6), (15).to_bytes(3, "little") * 2, bytes(4)
    frame = corner + size + time + small
    chunks = [
        (b"VP8X", b"\x02\0\0\0" + (side - 1).to_bytes(3, "little") * 2),
        (b"ANIM", bytes(6)),
        (b"ANMF", frame),
    ]
    body = b"".join(name + len(content).to_bytes(4, "little") + content for name, content in chunks)
    return b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body


@pytest.mark.parametrize("side", [8_001, 16_383])
def test_a_webp_bomb_is_refused_before_its_decoder_is_made(side, monkeypatch):
    assert decode(webp_canvas(32)).size == (32, 32)  # but for its size, the file is good
    monkeypatch.setattr("PIL.WebPImagePlugin._webp.WebPAnimDecoder", lambda data: pytest.fail("decoded"))
    with pytest.raises(BadImage, match=f"{side} x {side} pixels") as caught:
        decode(webp_canvas(side))
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"lossless": True, "exif": b"Exif\0\0II*\0"}])
def test_the_size_of_every_kind_of_webp_is_read(options):
    data = encoded(noise(0, 40, 24), "WEBP", **options)
    assert decode(data, max_pixels=40 * 24).size == (40, 24)
    with pytest.raises(BadImage, match="40 x 24 pixels"):
        decode(data, max_pixels=40 * 24 - 1)


def tiff_of(side: int) -> bytes:
    """A small TIFF whose header announces `side` x `side` pixels."""
    data = bytearray(encoded(Image.new("L", (8, 8)), "TIFF"))
    start = int.from_bytes(data[4:8], "little")
    for entry in range(start + 2, start + 2 + 12 * int.from_bytes(data[start : start + 2], "little"), 12):
        if int.from_bytes(data[entry : entry + 2], "little") in (256, 257):
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, side)
    return bytes(data)


def gif_of(side: int) -> bytes:
    """A small GIF whose header announces `side` x `side` pixels."""
    data = encoded(Image.new("P", (8, 8)), "GIF")
    return data[:6] + struct.pack("<HH", side, side) + data[10:]


def jpeg_of(side: int) -> bytes:
    """A small JPEG whose header announces `side` x `side` pixels."""
    data = jpeg(0)
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", side, side) + data[start + 4 :]


@pytest.mark.parametrize("maker", [tiff_of, gif_of, jpeg_of, bomb])
def test_a_bomb_of_any_format_is_refused(maker):
    with pytest.raises(BadImage, match="60000 x 60000 pixels") as caught:
        decode(maker(60_000))
    assert caught.value.reason == "too_large"


def png_chunk(name: bytes, content: bytes, sound: bool = True) -> bytes:
    sum_ = zlib.crc32(name + content) if sound else 0
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", sum_)


def with_chunk(png: bytes, chunk: bytes) -> bytes:
    """The PNG with another chunk behind its header."""
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"tEXt", b"parameters\0steps: 20", sound=False),
        png_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(10_000_000))),  # a bomb of text
        png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(10_000_000))),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(10_000_000))),
        png_chunk(b"zTXt", b"parameters\0\0not zlib"),
        png_chunk(b"iTXt", b"workflow"),
        png_chunk(b"tEXt", b""),
        png_chunk(b"eXIf", b"MM\0*", sound=False),
    ],
)
def test_broken_remarks_beside_good_pixels_are_no_fault(chunk):
    image = decode(with_chunk(encoded(noise(3)), chunk))
    np.testing.assert_array_equal(pixels(image), pixels(noise(3)))


def test_a_broken_remark_costs_neither_orientation_nor_transparency():
    exif = Image.Exif()
    exif[0x0112] = 6
    broken = png_chunk(b"tEXt", b"x", sound=False)
    assert decode(with_chunk(encoded(noise(3), exif=exif), broken)).size == (16, 24)
    assert (
        decode(with_chunk(encoded(Image.new("RGB", (1, 1)), transparency=(0, 0, 0)), broken)).getpixel((0, 0)) == WHITE
    )


@pytest.mark.parametrize("name", [b"IDAT", b"PLTE", b"tRNS"])
def test_broken_pixels_palettes_and_transparency_are_faults(name):
    palette = Image.new("P", (16, 16))
    palette.putpalette([255, 0, 0, 0, 0, 0])
    data = bytearray(encoded(palette, transparency=0))
    data[data.index(name) + 4] ^= 1
    with pytest.raises(BadImage) as caught:
        decode(bytes(data))
    assert caught.value.reason == "corrupt"


def test_sixteen_bits_of_colour_and_the_transparent_grey():
    rows = b"\0" + struct.pack(">6H", 0, 257 * 100, 65535, 65535, 0, 257 * 7)
    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    parts = [png_chunk(b"IHDR", head), png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    image = decode(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0, 100, 255), (255, 0, 7)]

    values = np.array([[0, 257 * 100, 257 * 9]], dtype=np.uint16)
    grey = with_chunk(encoded(Image.fromarray(values)), png_chunk(b"tRNS", struct.pack(">H", 257 * 9)))
    np.testing.assert_array_equal(pixels(decode(grey))[0, :, 0], [0, 100, 255])


@pytest.mark.parametrize(
    ("kind", "frames", "animated"),
    [("GIF", 2, True), ("WEBP", 2, True), ("PNG", 2, True), ("GIF", 1, False), ("WEBP", 1, False), ("PNG", 1, False)],
)
def test_what_a_file_was_is_told(kind, frames, animated):
    pictures = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLACK)[:frames]]
    data = encoded(pictures[0], kind, save_all=True, append_images=pictures[1:])
    picture = open_picture(data)
    assert (picture.format, picture.animated) == (kind, animated)
    assert picture.image.size == (8, 8)


def test_a_broken_second_frame_is_not_looked_at():
    frames = [noise(0), noise(1)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(data[: len(data) * 3 // 4]).animated


def test_an_orientation_that_is_no_number_is_ignored():
    entry = struct.pack("<HHI4s", 0x0112, 2, 4, b"up")  # a text
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    assert open_picture(encoded(noise(0), exif=exif)).image.size == (24, 16)


def fuzz(count: int, seed: int) -> tuple[int, int]:
    """Decode so many mutants of every format; how many were pictures all the same, and how many were bad."""
    random = np.random.default_rng(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [noise(1)]}
    seeds = [
        encoded(noise(0), "JPEG", exif=exif),
        encoded(noise(0), "JPEG", progressive=True),
        encoded(Image.new("CMYK", (8, 8)), "JPEG"),
        encoded(noise(0)),
        encoded(noise(0).convert("P"), transparency=3),
        encoded(Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24) * 100)),
        with_chunk(encoded(noise(0), exif=exif), png_chunk(b"tEXt", b"parameters\0steps")),
        encoded(noise(0), "WEBP", lossless=True),
        encoded(noise(0), "WEBP", exif=exif),
        encoded(noise(0).convert("RGBA"), "WEBP", **frames),
        encoded(noise(0), "PNG", **frames),
        encoded(noise(0), "GIF", **frames),
        encoded(noise(0), "BMP"),
        encoded(noise(0), "TIFF", compression="tiff_lzw"),
        encoded(noise(0), "TIFF", compression="jpeg"),
    ]
    good = bad = 0
    for number in range(count):
        data = mutated(seeds[number % len(seeds)], random)
        try:
            image = decode(data, max_pixels=1_000_000)
        except BadImage as error:
            assert error.reason in REASONS
            bad += 1
        else:
            assert image.mode == "RGB"
            assert image.width * image.height <= 1_000_000
            good += 1
    return good, bad


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutants_raise_nothing_but_bad_image():
    good, bad = fuzz(600, seed=0)
    assert good > 60
    assert bad > 60


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ten_thousand_mutants_raise_nothing_but_bad_image():
    good, bad = fuzz(10_000, seed=1)
    assert good > 1000
    assert bad > 1000
