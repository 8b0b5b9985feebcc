"""Lists of images in JSON: entries streamed one by one, and image files that lie beside the list, and only there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffpref.errors import UserError

CHUNK = 2**20  # characters read at a time


def list_file(path: Path, split: str, names: tuple[str, ...]) -> Path:
    """The list of a split: `path` itself, or in a folder the first of `names` that is there ({split} is filled in).

    Raises UserError where there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    wanted = [name.format(split=split) for name in names]
    for name in wanted:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} holds no {' or '.join(wanted)}: give the file itself, or choose another --split")


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON array, or of a file with one object a line, with a few in memory at a time.

    Raises UserError, naming the entry, where the file cannot be read or is not of such a form.
    """
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as opened:
            for value in _values(opened):
                if not isinstance(value, dict):
                    raise UserError(f"{file}: entry {number} is no object")
                yield value
                number += 1
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read as JSON: entry {number}: {error}") from error


def _values(opened: Any) -> Iterator[Any]:
    """The values of a JSON array, or those that simply follow one another."""
    decode = json.JSONDecoder().raw_decode
    text, place = opened.read(CHUNK), 0
    array = text.lstrip().startswith("[")
    if array:
        place = text.index("[") + 1
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if array and text[place : place + 1] == "]":
            return
        try:
            value, end = decode(text, place)
        except ValueError:
            more = opened.read(max(CHUNK, len(text) - place))
            if not more:
                if text[place:].strip() or array:
                    raise
                return
            text, place = text[place:] + more, 0
            continue
        yield value
        place = end


def image_file(root: Path, folders: tuple[str, ...], name: object) -> bytes:
    """The bytes of an image that a list names, looked for in `root` and in these folders of it; b"" where it is not.

    A name that leads out of `root` names nothing.
    """
    inside = root.resolve()
    for folder in ("", *folders):
        place = (root / folder / str(name)).resolve()
        if place.is_relative_to(inside) and place.is_file():
            try:
                return place.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {place}: {error.strerror}") from error
    return b""


def fault_of_prompt(prompt: object) -> str | None:
    """Why something is no prompt, as the reason of a dropped row, or None."""
    if prompt is None:
        return "null_caption"
    return None if isinstance(prompt, str) and prompt.strip() else "empty_caption"
