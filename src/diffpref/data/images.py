"""Safe decoding of image bytes from strangers: a few formats, a limit on pixels, always RGB.

The decoders are called by their classes rather than through `PIL.Image.open`: its limit on pixels is a global of PIL,
and the first large image would print a warning. Here the limit is an argument, checked on the header alone.
"""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_PIXELS = 64_000_000
MAX_STRETCH = 32  # one side over the other: resizing a longer strip by its short side would fill the memory
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
PNG_TURNS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG may have an orientation
DECODERS: dict[bytes, Callable[[io.BytesIO], ImageFile]] = {  # by the first bytes of a file
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"GIF87a": GifImageFile,
    b"GIF89a": GifImageFile,
    b"BM": BmpImageFile,
    b"II*\x00": TiffImageFile,
    b"MM\x00*": TiffImageFile,
}
FORMATS = "JPEG, PNG, WEBP, GIF, BMP or TIFF"
SUFFIXES: dict[Callable[[io.BytesIO], ImageFile], str] = {
    JpegImageFile: "jpg",
    PngImageFile: "png",
    WebPImageFile: "webp",
    GifImageFile: "gif",
    BmpImageFile: "bmp",
    TiffImageFile: "tiff",
}


REASONS = ("empty", "not_an_image", "too_large", "truncated", "corrupt", "unsupported_mode")


class BadImage(Exception):  # noqa: N818 - it describes the image, as UserError describes the user
    """These bytes give no picture.

    `reason` is one of REASONS; what makes a picture too narrow for training (`pixels.py`) is `too_long`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """A decoded image with what its file was: its format, and whether it had further frames, which are not decoded."""

    image: Image.Image
    format: str
    animated: bool


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in RGB: upright by its EXIF orientation, alpha laid on white, the first frame of an animation.

    Raises BadImage where the bytes are no image of a known format, are cut short or broken, or where the header
    announces more than `max_pixels` (nothing is decoded then). It raises nothing else, whatever the bytes are.
    """
    return open_picture(data, max_pixels).image


def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """As `decode`, with what is to be known of the file."""
    if not data:
        raise BadImage("empty", "no bytes")
    decoder = _decoder(data)
    try:
        return _read(decoder, data, max_pixels)
    except BadImage as error:
        if decoder is not PngImageFile or error.reason != "corrupt" or (pixels := _without_remarks(data)) == data:
            raise
        return _read(decoder, pixels, max_pixels)


def _read(decoder: Callable[[io.BytesIO], ImageFile], data: bytes, max_pixels: int) -> Picture:
    with _named_errors():
        image = _opened(decoder, data, max_pixels)
        image.load()
        upright = _upright(_rgb(image), _orientation(image))
        return Picture(upright, str(image.format), _is_animated(image))


def _opened(decoder: Callable[[io.BytesIO], ImageFile], data: bytes, max_pixels: int) -> ImageFile:
    """The image with its header read, and its pixels not."""
    with _named_errors():
        if decoder is WebPImageFile:  # its decoder takes memory for the whole canvas as soon as it is made
            _refuse_large(_webp_size(data), max_pixels)
        image = decoder(io.BytesIO(data))
        _refuse_large(image.size, max_pixels)
        return image


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    """Whatever is raised inside as a BadImage."""
    try:
        yield
    except BadImage:
        raise
    except Image.DecompressionBombError as error:  # a frame or tile larger than the header's picture
        raise BadImage("too_large", str(error)) from error
    except Exception as error:  # decoders raise a dozen kinds of error on foreign bytes
        message = " ".join(str(error).split()) or type(error).__name__
        reason = "truncated" if isinstance(error, EOFError) or "truncated" in message.lower() else "corrupt"
        raise BadImage(reason, message) from error


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height of what `decode` would give, by the header alone where that tells how the picture lies.

    Raises BadImage where the header already says that there is no picture.
    """
    if not data:
        raise BadImage("empty", "no bytes")
    decoder = _decoder(data)
    if decoder is TiffImageFile or (decoder is PngImageFile and any(name in data for name in PNG_TURNS)):
        return decode(data).size  # a PNG may say so behind its pixels, and a TIFF is turned while it is decoded
    try:
        image = _opened(decoder, data, MAX_PIXELS)
    except BadImage:
        return decode(data).size  # which may know a way
    width, height = image.size
    turned = decoder is not PngImageFile and _orientation(image) in SIDEWAYS  # asked, a PNG would read its pixels
    return (height, width) if turned else (width, height)


def suffix(data: bytes) -> str:
    """The usual ending of a file with these bytes. Raises BadImage where they are no image of a known format."""
    return SUFFIXES[_decoder(data)]


def _refuse_large(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImage("too_large", f"{width} x {height} pixels, more than {max_pixels / 1e6:g} million")


def _webp_size(data: bytes) -> tuple[int, int]:
    """The canvas that a WEBP file's first chunk announces (RFC 9649); (0, 0) where it has no such chunk."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def _without_remarks(data: bytes) -> bytes:
    """A PNG without the chunks that pixels do not need: texts, colour profiles, and others that fail their sum.

    What paints a picture often writes its settings into such texts, and PIL refuses the whole file where one is
    damaged or too long. Transparency is part of the pixels and stays.
    """
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        end = place + 12 + length
        name = data[place + 4 : place + 8]
        needed = name[:1].isupper() or name == b"tRNS"
        sound = data[end - 4 : end] == struct.pack(">I", zlib.crc32(data[place + 4 : end - 4]))
        if needed or (sound and name not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP")):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])


def _decoder(data: bytes) -> Callable[[io.BytesIO], ImageFile]:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    for start, decoder in DECODERS.items():
        if data.startswith(start):
            return decoder
    raise BadImage("not_an_image", f"these bytes are no {FORMATS} image")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode in ("F", "LAB"):  # no agreed range of values; PIL would clip or misread them
        raise BadImage("unsupported_mode", f"pixels of the kind {image.mode!r} have no plain meaning in RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits -> 8 bits by scaling; PIL's own conversion clips everything above 255 to white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadImage("unsupported_mode", "32-bit integer pixels have no plain meaning in RGB")
    grey = np.rint(values / 257).astype(np.uint8)
    grey[values == image.info.get("transparency")] = 255  # the one value that a PNG may call transparent
    return Image.fromarray(grey)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF beside good pixels: the picture stands as it is stored
        return 1


def _is_animated(image: ImageFile) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a broken second frame, which nobody reads
        return True


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
