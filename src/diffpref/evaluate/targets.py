"""What can be scored: a folder of generated images in either layout, or a dataset in the normal form."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.engine import Images, ledger_of
from diffpref.data.schema import DATASET_FILE
from diffpref.errors import UserError
from diffpref.evaluate.folders import GeneratedImage, read_folder
from diffpref.files import stamp


@dataclass(frozen=True)
class Files:
    """Image files as what the engine reads: a row each."""

    paths: tuple[Path, ...]

    @property
    def sides(self) -> tuple[str, ...]:
        """The one image of a row."""
        return ("image",)

    def __len__(self) -> int:
        return len(self.paths)

    def iter_images(self, indices: Collection[int] | None = None) -> Iterator[tuple[int, str, bytes]]:
        """(row, side, bytes) of the given rows, all by default. Raises UserError where a file cannot be read."""
        for row in range(len(self)) if indices is None else sorted(indices):
            try:
                yield row, "image", self.paths[row].read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {self.paths[row]}: {error.strerror}") from None

    def parts(self) -> Iterator[tuple[str, Files]]:
        """All of them, under a name that changes whenever one is written."""
        try:
            yield stamp(self.paths), self
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None

    def where(self, row: int, side: str) -> str:
        """The file."""
        return str(self.paths[row])


@dataclass(frozen=True)
class Target:
    """Images with their prompts, a row each or a row for each pair, and where their scores belong.

    columns: what names the images in a file of scores, an entry an image, row by row and side by side.
    folder: where files of scores are written. images: the records of a folder, none of a dataset.
    """

    path: Path
    prompts: tuple[str, ...]
    pictures: Images
    folder: Path
    ledger: Path
    columns: dict[str, list[Any]] = field(repr=False)
    images: tuple[GeneratedImage, ...] = field(default=(), repr=False)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of generated images."""
        return bool(self.images)

    def of_side(self, side: str) -> range:
        """The places, among all images, of one side's."""
        sides = self.pictures.sides
        return range(sides.index(side), len(self.prompts) * len(sides), len(sides))


def open_target(path: Path, split: str = "train", ledger: Path | None = None) -> Target:
    """A folder of generated images, or a dataset's split. Raises UserError where `path` is neither."""
    generated = (path / "metadata.jsonl").is_file() or any(path.glob("*/caption.txt"))
    tables = path.suffix == ".parquet" or (path / DATASET_FILE).is_file() or any(path.glob("*.parquet"))
    if not generated and (tables or any(path.glob("data/*.parquet"))):
        return _of_dataset(PreferenceDataset.open(path, split), ledger)
    return folder_target(path, ledger)


def folder_target(folder: Path, ledger: Path | None = None) -> Target:
    """A folder of generated images; its scores and their ledger stand within. Raises UserError as `read_folder`."""
    images = tuple(read_folder(folder))
    columns = {
        "file_name": [image.file.relative_to(folder).as_posix() for image in images],
        "prompt": [image.prompt for image in images],
        "index": [image.index for image in images],
        "seed": [image.seed for image in images],
    }
    scores = folder / "scores"
    pictures = Files(tuple(image.file for image in images))
    return Target(folder, tuple(columns["prompt"]), pictures, scores, ledger or scores / "ledger", columns, images)


def _of_dataset(dataset: PreferenceDataset, ledger: Path | None) -> Target:
    """A dataset's split. Its scores stand beside it: within, they would be taken for shards of it."""
    sides = dataset.sides
    columns = {
        "id": [name for name in dataset.ids for _ in sides],
        "side": [side for _ in dataset.ids for side in sides],
        "prompt": [prompt for prompt in dataset.prompts for _ in sides],
    }
    place = dataset.path.resolve()
    scores = place.with_name(f"{place.name}.scores") / dataset.split
    kept = ledger_of(dataset.path, ledger)
    return Target(dataset.path, tuple(dataset.prompts), dataset.pictures, scores, kept, columns)
