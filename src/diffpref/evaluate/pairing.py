"""Which images belong together: of the same prompt, at the same place among its images, from the same seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffpref.errors import UserError, nearest
from diffpref.evaluate.folders import GeneratedImage, read_folder


@dataclass(frozen=True)
class Place:
    """One prompt and seed, with the image that each folder has of it, the base's first."""

    prompt: str
    index: int
    seed: int | None
    category: str | None
    files: tuple[Path, ...]


def pair(folders: Sequence[Path]) -> list[Place]:
    """The places that all folders fill, in the order of the first.

    A category may stand in one folder alone. Raises UserError where the folders do not hold the same prompts, images
    and seeds, or name different categories.
    """
    listed = [_by_place(read_folder(folder)) for folder in folders]
    for folder, images in zip(folders[1:], listed[1:], strict=True):
        _refuse_unpaired(folders[0], folder, listed[0], images)
        _refuse_unpaired(folder, folders[0], images, listed[0])
    places = []
    for key in listed[0]:
        found = [images[key] for images in listed]
        for folder, image in zip(folders, found, strict=True):
            if image.seed != found[0].seed:
                raise UserError(
                    f"the folders do not pair: image {key[1]} of the prompt {key[0]!r} has seed {found[0].seed} in "
                    f"{folders[0]} and {image.seed} in {folder}"
                )
        named = {image.category: image for image in found if image.category is not None}
        if len(named) > 1:
            (one, first), (other, second) = list(named.items())[:2]
            raise UserError(f"{second.where}: the category is {other!r}, but {one!r} in {first.where}")
        places.append(Place(*key, found[0].seed, next(iter(named), None), tuple(image.file for image in found)))
    return places


def of_categories(places: Sequence[Place], wanted: Sequence[str]) -> list[Place]:
    """The places whose prompts are of the wanted categories; all of them where none is wanted.

    Raises UserError for a category that no prompt has.
    """
    known = {place.category for place in places if place.category is not None}
    for category in wanted:
        if not known:
            raise UserError(f"--category {category}: no image has a category, in metadata.jsonl the key `category`")
        if category not in known:
            raise UserError(f"--category {category}: no prompt is of it: {nearest(category, known)}")
    return [place for place in places if not wanted or place.category in wanted]


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its last parts, as many as tell them apart.

    Raises UserError where one folder is named twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for place, path in enumerate(parts):
        if path in parts[:place]:
            raise UserError(f"{folders[place]} is named twice; compare a folder with others")
    depth = 1
    while len(names := ["/".join(path[-depth:]) for path in parts]) > len(set(names)):
        depth += 1
    return names


def _by_place(images: Sequence[GeneratedImage]) -> dict[tuple[str, int], GeneratedImage]:
    """Each image by its prompt and index, which must name one image only."""
    found: dict[tuple[str, int], GeneratedImage] = {}
    for image in images:
        if found.setdefault((image.prompt, image.index), image) is not image:
            raise UserError(f"{image.where}: a second image {image.index} of the prompt {image.prompt!r}")
    return found


def _refuse_unpaired(
    has: Path,
    lacks: Path,
    images: dict[tuple[str, int], GeneratedImage],
    others: dict[tuple[str, int], GeneratedImage],
) -> None:
    if not (keys := images.keys() - others.keys()):
        return
    prompt, index = min(keys)
    missing = f"image {index} of the prompt" if any(prompt == other for other, _ in others) else "the prompt"
    raise UserError(
        f"the folders do not pair: {lacks} lacks {missing} {prompt!r}, which {has} has "
        f"({len(keys)} such image{'s' * (len(keys) > 1)})"
    )
