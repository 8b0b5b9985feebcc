"""ImageRewardDB: images with a `rank` among those of their prompt, 1 for the best; equal ranks are ties.

`metadata-SPLIT.parquet` has a row an image: `prompt_id`, `prompt`, `rank`, and its file as `image_path`, or the image
itself as `image`. A list in JSON has the same keys, or an object a prompt with `generations` and `ranking`. Where
images are files, the rows of a prompt may stand anywhere, so the list is read at once and an image when its turn comes;
where they are in the parquet file, the rows of a prompt must follow one another.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from diffpref.data import parquet
from diffpref.data.listed import entries, fault_of_prompt, image_file, list_file
from diffpref.data.schema import Dropped, Group
from diffpref.errors import UserError, nearest

KIND: Literal["groups"] = "groups"
LISTS = ("metadata-{split}.parquet", "metadata-{split}.json", "{split}.parquet", "{split}.json")
REQUIRED = ("prompt_id", "prompt", "rank")
Rows = list[dict[str, Any]]


def count(path: Path, split: str) -> int:
    """The number of prompts. Raises UserError where the list is missing, broken, or of another form."""
    file = list_file(path, split, LISTS)
    return sum(1 for _ in _rows_of_prompts(file, with_images=False))


def read(path: Path, split: str) -> Iterator[Group | Dropped]:
    """Every prompt as a ranked group, or why it is none. Raises UserError as `count`."""
    return read_from(path, split, 0)


def read_from(path: Path, split: str, start: int) -> Iterator[Group | Dropped]:
    """As `read`, without the first `start` prompts, whose image files are not read."""
    file = list_file(path, split, LISTS)
    for number, rows in enumerate(_rows_of_prompts(file, with_images=True)):
        if number >= start:
            yield _group(file, number, rows)


def _group(file: Path, number: int, rows: Rows) -> Group | Dropped:
    prompt = rows[0].get("prompt")
    if reason := fault_of_prompt(prompt):
        return Dropped(file.name, number, reason)
    ranked = [row for row in rows if isinstance(row.get("rank"), int | float)]
    if len(ranked) < len(rows):
        return Dropped(file.name, number, "no_ranking", f"{len(rows) - len(ranked)} of {len(rows)} images have no rank")
    return Group(
        file.name,
        number,
        id=f"{file.stem}-{number}",
        prompt=str(prompt),
        images=tuple(_image(file, row) for row in rows),
        scores=tuple(-float(row["rank"]) for row in rows),
        source="imagereward",
        names=tuple(str(row["image_path"]) if row.get("image_path") else None for row in rows),
    )


def _image(file: Path, row: dict[str, Any]) -> bytes:
    if "image" in row:
        return parquet.image_bytes(row["image"])
    return image_file(file.parent, ("images",), row.get("image_path"))


def _rows_of_prompts(file: Path, with_images: bool) -> Iterator[Rows]:
    """The rows of each prompt, in the order in which the prompts come."""
    if file.suffix != ".parquet":
        return _of_entries(file)
    with parquet.opened(file) as opened:
        columns = opened.schema_arrow
    _check_keys(file, columns.names)
    if "image" not in columns.names:
        return _together(parquet.rows(file, [*REQUIRED, "image_path"]))
    if not parquet.is_image_type(columns.field("image").type):
        raise UserError(f"{file}: column 'image' is {columns.field('image').type}, not the bytes of images")
    light = [*REQUIRED, *(["image_path"] if _is_text(columns, "image_path") else [])]
    rows = parquet.rows(file, [*light, "image"] if with_images else light)
    return (list(group) for _, group in groupby(rows, key=lambda row: row["prompt_id"]))


def _of_entries(file: Path) -> Iterator[Rows]:
    """The same of a list in JSON."""
    first = next(entries(file), None)
    if first is None:
        return iter(())
    if "generations" not in first:
        _check_keys(file, list(first))
        return _together(entries(file))
    return ([*_apart(file, number, entry)] for number, entry in enumerate(entries(file)))


def _apart(file: Path, number: int, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row an image, of an entry that lists them all."""
    images, ranks = entry.get("generations"), entry.get("ranking")
    if not isinstance(images, list) or not isinstance(ranks, list) or len(images) != len(ranks) or not images:
        raise UserError(f"{file}: entry {number} has no 'generations' with a 'ranking' of the same length")
    for image, rank in zip(images, ranks, strict=True):
        yield {"prompt": entry.get("prompt"), "image_path": image, "rank": rank}


def _together(rows: Iterable[dict[str, Any]]) -> Iterator[Rows]:
    prompts: dict[Any, Rows] = {}
    for row in rows:
        prompts.setdefault(row.get("prompt_id"), []).append(row)
    return iter(prompts.values())


def _check_keys(file: Path, names: list[str]) -> None:
    for key in REQUIRED:
        if key not in names:
            raise UserError(f"{file} has no column {key!r} ({nearest(key, set(names) - set(REQUIRED))})")
    if "image" not in names and "image_path" not in names:
        raise UserError(f"{file} has neither the column 'image' nor 'image_path' ({nearest('image_path', names)})")


def _is_text(columns: pa.Schema, name: str) -> bool:
    return name in columns.names and pa.types.is_string(columns.field(name).type)
