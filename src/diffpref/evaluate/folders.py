"""Read folders of generated images into records, from either of two layouts.

An imagefolder: image files and `metadata.jsonl` with one object a line (`file_name`, `prompt`, `index`, `seed`,
`category`).
DRO's layout: one folder a prompt, `NNN/caption.txt` beside `NNN/*.png`; it records no seeds.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffpref.data.images import BadImage, decode
from diffpref.errors import UserError
from diffpref.files import stays_inside

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class GeneratedImage:
    """One image of a folder: `index` is its place among the images of its prompt, `where` names it in messages.

    `category`: the kind of prompt, by which a comparison is broken down.
    """

    file: Path
    prompt: str
    index: int
    seed: int | None
    where: str = ""
    category: str | None = None


def read_folder(folder: Path) -> list[GeneratedImage]:
    """The records of a folder's images, in the order in which the folder lists them.

    Raises UserError, naming file and line, for a folder or an image that is missing and for a line that is wrong.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if (folder / "metadata.jsonl").is_file():
        images = _read_metadata(folder)
    elif any(folder.glob("*/caption.txt")):
        images = _read_captions(folder)
    else:
        raise UserError(
            f"{folder} is not a folder of generated images: it has no metadata.jsonl, or its generation is unfinished"
        )
    if not images:
        raise UserError(f"{folder} lists no images")
    return images


def open_image(image: GeneratedImage) -> Image.Image:
    """Decode an image as RGB, transparency laid over white.

    Raises UserError where the file is missing, broken, too large or no image.
    """
    try:
        return decode(image.file.read_bytes())
    except OSError as error:
        raise UserError(f"{image.where or image.file}: cannot read {image.file}: {error.strerror}") from None
    except BadImage as error:
        raise UserError(f"{image.where or image.file}: {image.file} is broken: {error}") from None


def _read_metadata(folder: Path) -> list[GeneratedImage]:
    path = folder / "metadata.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    images: list[GeneratedImage] = []
    of_prompt: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        row = _read_row(line, where)
        prompt = _text(row, "prompt", where)
        file = _file(folder, _text(row, "file_name", where), where)
        index = _whole_number(row, "index", where)
        seed = _whole_number(row, "seed", where)
        category = None if row.get("category") is None else _text(row, "category", where)
        place = of_prompt[prompt] if index is None else index
        images.append(GeneratedImage(file, prompt, place, seed, where, category))
        of_prompt[prompt] += 1
    return images


def _read_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        raise UserError(f"{where}: not JSON") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    return row


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: no {key}")
    try:
        value.encode("utf-8")  # JSON can spell half a character, as \ud800, which no file can hold
    except UnicodeEncodeError:
        raise UserError(f"{where}: the {key} is not valid Unicode") from None
    return value


def _whole_number(row: dict[str, Any], key: str, where: str) -> int | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_SEED:
        raise UserError(f"{where}: {key} must be a whole number from 0 to 2^63 - 1, not {str(value)[:40]!r}")
    return value


def _file(folder: Path, name: str, where: str) -> Path:
    """The file of that name, which must lie inside the folder: a list of images must not reach for other files."""
    if not stays_inside(name):
        raise UserError(f"{where}: file_name must stay inside the folder: {name!r}")
    file = folder / name
    if not file.is_file():
        raise UserError(f"{where}: no such image: {file}")
    return file


def _read_captions(folder: Path) -> list[GeneratedImage]:
    images: list[GeneratedImage] = []
    of_prompt: Counter[str] = Counter()
    for place in sorted((path for path in folder.iterdir() if path.is_dir()), key=_by_number):
        files = sorted(place.glob("*.png"), key=_by_number)
        caption = place / "caption.txt"
        if caption.is_file() and not files:
            raise UserError(f"{place} has a caption but no PNG images")
        if files and not caption.is_file():
            raise UserError(f"{place} has images but no caption.txt")
        if not files:
            continue
        try:
            prompt = caption.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {caption}: {error}") from None
        if not prompt:
            raise UserError(f"{caption} is empty")
        for file in files:
            images.append(GeneratedImage(file, prompt, of_prompt[prompt], None, str(caption)))
            of_prompt[prompt] += 1
    return images


def _by_number(path: Path) -> list[tuple[int, str]]:
    """A sorting key under which 2.png stands before 10.png."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]
