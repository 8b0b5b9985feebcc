"""Safe decoding of image bytes from strangers: a few formats, a limit on pixels, always RGB.

The decoders are called by their classes rather than through `PIL.Image.open`: its limit on pixels is a global of PIL,
and the first large image would print a warning. Here the limit is an argument, checked on the header alone.
"""

import io
from collections.abc import Callable

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


class BadImage(Exception):  # noqa: N818 - it describes the image, as UserError describes the user
    """These bytes give no picture.

    `reason` is one of: empty, not_an_image, too_large, truncated, corrupt, unsupported_mode.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in RGB: upright by its EXIF orientation, alpha laid on white, the first frame of an animation.

    Raises BadImage where the bytes are no image of a known format, are cut short or broken, or where the header
    announces more than `max_pixels` (nothing is decoded then).
    """
    if not data:
        raise BadImage("empty", "no bytes")
    decoder = _decoder(data)
    try:
        image = decoder(io.BytesIO(data))
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage("too_large", f"{width} x {height} pixels, more than {max_pixels / 1e6:g} million")
        image.load()
        return _upright(_rgb(image), _orientation(image))
    except BadImage:
        raise
    except Exception as error:  # decoders raise a dozen kinds of error on foreign bytes
        message = str(error) or type(error).__name__
        reason = "truncated" if isinstance(error, EOFError) or "truncated" in message.lower() else "corrupt"
        raise BadImage(reason, message) from error


def suffix(data: bytes) -> str:
    """The usual ending of a file with these bytes. Raises BadImage where they are no image of a known format."""
    return SUFFIXES[_decoder(data)]


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
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF beside good pixels: the picture stands as it is stored
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
