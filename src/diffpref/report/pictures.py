"""The pictures of a page: as data: addresses inside it, or as files beside it."""

import base64
import hashlib
import html
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

CRISP_BELOW = 128  # pixels: a smaller picture is enlarged by whole pixels, not blurred
LARGEST_SHOWN = 512  # pixels: a larger picture is reduced, so that the page stays one file to send
FOLDER = "images"
Keep = Callable[[bytes, str], str]  # a picture's bytes and format to the address by which the page finds it


def inside(data: bytes, form: str) -> str:
    """Keep a picture in the page itself."""
    return f"data:image/{form};base64,{base64.b64encode(data).decode('ascii')}"


@dataclass(frozen=True)
class Beside:
    """Keep pictures as files beside the page, each once."""

    folder: Path

    def __call__(self, data: bytes, form: str) -> str:
        name = f"{FOLDER}/{hashlib.sha256(data).hexdigest()[:24]}.{form}"
        if not (self.folder / name).is_file():
            (self.folder / FOLDER).mkdir(exist_ok=True)
            (self.folder / name).write_bytes(data)
        return name


def picture(image: Image.Image, text: str, largest: int = LARGEST_SHOWN, keep: Keep = inside) -> str:
    """An `img` of the picture with a text instead of it, written anew, so nothing but pixels enters the page."""
    crisp = ' class="crisp"' if max(image.size) < CRISP_BELOW else ""
    shown = image.copy()
    shown.thumbnail((largest, largest))
    form = "PNG" if max(image.size) <= 2 * CRISP_BELOW else "JPEG"
    written = io.BytesIO()
    shown.save(written, form, quality=90, optimize=True)
    source = f'src="{keep(written.getvalue(), form.lower())}"'
    if isinstance(keep, Beside):  # a large page reads a picture when it comes into view
        source += ' loading="lazy" decoding="async"'
    width, height = shown.size
    return f'<img{crisp} {source} width="{width}" height="{height}" alt="{html.escape(text)}">'


def card(shown: list[tuple[str, str, str]], prompt: str, note: str, attributes: str = "") -> str:
    """Images side by side, each (name, value, markup of the picture), over their prompt and a note, which is markup."""
    images = [
        f'<div><div class="label"><span>{html.escape(name)}</span><b>{html.escape(value)}</b></div>{picture}</div>'
        for name, value, picture in shown
    ]
    caption = f'<p class="prompt" dir="auto">{html.escape(prompt)}</p><div class="note">{note}</div>'
    return (
        f'<figure class="card {"pair" * (len(shown) > 1)}"{attributes}><div class="images">{"".join(images)}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
