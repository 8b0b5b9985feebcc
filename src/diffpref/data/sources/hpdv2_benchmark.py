"""HPDv2's benchmark: a list of prompts for each style, and what models drew for them.

`STYLE.json` is an array of prompts; the image of prompt N by a model is `benchmark_imgs/MODEL/STYLE/0000N.jpg`, as the
archives of the models unpack. Nobody judged these images: they become single images without a label. `split` only names
what is written.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from diffpref.data.listed import image_file
from diffpref.data.schema import Dropped, Found, ImageRow, Kind
from diffpref.errors import UserError

KIND: Kind = "images"
IMAGES = "benchmark_imgs"


def count(path: Path, split: str) -> int:
    """The number of images. Raises UserError where the lists or the folder of images are missing."""
    return sum(1 for _ in _places(path))


def read(path: Path, split: str) -> Iterator[Found | Dropped]:
    """Every image with its prompt, or the reason why it has none. Raises UserError as `count`."""
    return read_from(path, split, 0)


def read_from(path: Path, split: str, start: int) -> Iterator[Found | Dropped]:
    """As `read`, without the first `start` images, which are not read."""
    prompts = _prompts(path)
    for number, (style, file) in enumerate(_places(path)):
        if number < start:
            continue
        name = file.relative_to(path / IMAGES).with_suffix("").as_posix()
        place = int(file.stem) if file.stem.isdecimal() else -1
        if not 0 <= place < len(prompts[style]):
            yield Dropped(f"{style}.json", number, "no_prompt", f"{name} is the number of no prompt")
            continue
        content = image_file(path, (), file.relative_to(path))
        model = file.relative_to(path / IMAGES).parts[0]
        image = ImageRow(
            name, prompts[style][place], content, image_model=model, source="hpdv2-benchmark", group_id=style
        )
        yield Found(f"{style}.json", place, image)


def _places(path: Path) -> Iterator[tuple[str, Path]]:
    """(style, file) of all images, sorted by model, style and number."""
    styles = _prompts(path)
    if not (path / IMAGES).is_dir():
        raise UserError(
            f"{path} holds no folder {IMAGES}; prompts alone are read by `diffpref generate --prompts FILE.json`"
        )
    for model in sorted(folder for folder in (path / IMAGES).iterdir() if folder.is_dir()):
        for style in sorted(styles):
            for file in sorted((model / style).glob("*.jpg")):
                yield style, file


def _prompts(path: Path) -> dict[str, list[str]]:
    """The prompts of each style."""
    if not path.is_dir():
        raise UserError(f"{path} is no folder" if path.exists() else f"{path} does not exist")
    found: dict[str, list[str]] = {}
    for file in sorted(path.glob("*.json")):
        try:
            prompts = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as JSON: {error}") from error
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"{file} is no array of prompts")
        found[file.stem] = prompts
    if not found:
        raise UserError(f"{path} holds no lists of prompts (STYLE.json)")
    return found
