"""Which bucket each row of a dataset belongs to, by the sizes in its images' headers.

A row has one bucket, for both images of a pair go through the network together: the one nearest to the mean of their
log aspect ratios. So it depends on the images alone, and not on which of them is the better one by label, score or
`data.swap`; a store that was built for one objective serves all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffpref.data.buckets import Size, bucket_sizes
from diffpref.data.building import Claims, ImageNotes, share
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import BadImage, upright_size
from diffpref.data.schema import Side
from diffpref.data.threads import map_in_order
from diffpref.errors import UserError
from diffpref.progress import Bar
from diffpref.train.config import DataConfig
from diffpref.types import Backbone


@dataclass(frozen=True)
class Buckets:
    """sizes: (width, height) of each bucket, the square first. of_row: the number of each row's, int64 (rows,)."""

    sizes: tuple[Size, ...]
    of_row: np.ndarray

    def of(self, rows: list[int]) -> int:
        """The one bucket of some rows. Raises ValueError for rows of several, which no tensor could hold."""
        found = set(self.of_row[rows].tolist())
        if len(found) != 1:
            raise ValueError(f"these rows are of {len(found)} buckets, but a batch has one shape")
        return found.pop()

    def counts(self, rows: list[int]) -> list[int]:
        """How many of these rows each bucket has."""
        return np.bincount(self.of_row[rows], minlength=len(self.sizes)).tolist()

    def told(self, counts: Iterable[int]) -> str:
        """What to say of so many items in each bucket."""
        return ", ".join(
            f"{width}x{height}: {count}" for (width, height), count in zip(self.sizes, counts, strict=True) if count
        )


def refuse_sizes(backbone: Backbone, data: DataConfig) -> None:
    """Raise UserError for a resolution, a step or a bucket that the family cannot take."""
    square, *others = bucket_sizes(data)
    backbone.latent_shape(*square)
    asked = [("bucket_step", (data.bucket_step, data.bucket_step))] if others else []
    for key, size in [*asked, *(("bucket_max_aspect", size) for size in others)]:
        try:
            backbone.latent_shape(*size)
        except UserError as error:
            raise UserError(f"data.{key}: {str(error).removeprefix('resolution: ')}") from error


def assign_buckets(folder: Path, dataset: PreferenceDataset, data: DataConfig, shown: bool = True) -> Buckets:
    """Each row's bucket. Where there are several, headers are read once, and what they say is kept in `folder`.

    Images that cannot be measured do not count; a row without any other belongs to the square.
    """
    sizes = bucket_sizes(data)
    if len(sizes) == 1:
        return Buckets(sizes, np.zeros(len(dataset), np.int64))
    width, height = np.moveaxis(_measured(folder, dataset, shown)[..., :2].astype(np.float64), -1, 0)
    known = (width > 0) & (height > 0)
    logs = np.log(np.where(known, width, 1) / np.where(known, height, 1))
    aspects = logs.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return Buckets(sizes, nearest(sizes, aspects))


def nearest(sizes: tuple[Size, ...], aspects: np.ndarray) -> np.ndarray:
    """The numbers of the sizes nearest to log aspect ratios (n,), int64 (n,); of two as near the earlier one."""
    own = np.log([width / height for width, height in sizes])
    found = np.zeros(len(aspects), np.int64)
    distance = np.abs(aspects - own[0])
    for number in range(1, len(sizes)):
        nearer = np.abs(aspects - own[number]) < distance
        found[nearer] = number
        distance = np.minimum(distance, np.abs(aspects - own[number]))
    return found


def _measured(folder: Path, dataset: PreferenceDataset, shown: bool) -> np.ndarray:
    """Width, height and check of each image, uint32 (rows, sides, 3), measured together with other processes.

    Where the folder cannot be written, each process measures for itself, and each start again.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    notes = ImageNotes(folder, dataset, "sizes", np.zeros(3, np.uint32), _sound)
    wanted = np.ones(len(dataset), bool)
    wanted[list(dataset.left_out)] = False

    def missing(rows: range) -> np.ndarray:
        at = slice(rows.start, rows.stop)
        return wanted[at] & ~_sound(notes.rows[at]).all(axis=1)

    left = missing(range(len(dataset)))
    units = [group for group in dataset.pictures.row_groups() if left[group.rows.start : group.rows.stop].any()]
    if not units:
        return notes.rows
    sides = {side: number for number, side in enumerate(dataset.sides)}
    with Bar("sizes", int(wanted.sum()), "rows", int(wanted.sum() - left.sum()), shown) as bar:

        def make(number: int) -> None:
            rows = units[number].rows
            notes.refresh(rows)
            lacking = {rows.start + int(row) for row in np.flatnonzero(missing(rows))}
            images = dataset.pictures.group_images(units[number], lacking) if lacking else ()
            for row, side, (width, height) in map_in_order(_looked_at, images):
                entry = np.array([[width, height, 0]], np.uint32)
                entry[:, 2] = _check(entry)
                notes.rows[row, sides[side]] = entry[0]
            notes.note(rows)
            bar.advance(int(left[rows.start : rows.stop].sum()))

        if os.access(folder, os.W_OK):
            names = [f"sizes {unit.shard.file.name} {unit.rows}" for unit in units]
            share(names, Claims(folder), make, lambda: True, lambda: None)
            notes.refresh(range(len(dataset)))
        else:
            for number in range(len(units)):
                make(number)
    return notes.rows


def _looked_at(image: tuple[int, Side, bytes]) -> tuple[int, Side, Size]:
    row, side, content = image
    try:
        return row, side, upright_size(content)
    except BadImage:  # what is wrong is said by who decodes it
        return row, side, (0, 0)


def _check(entries: np.ndarray) -> np.ndarray:
    """What stands beside widths and heights (..., 3), so that a flipped bit makes no other shape, nor zeros a size."""
    width, height = entries[..., 0], entries[..., 1]
    return width * np.uint32(0x9E3779B1) ^ height * np.uint32(0x85EBCA6B) ^ np.uint32(0x5BD1E995)


def _sound(entries: np.ndarray) -> np.ndarray:
    """Which entries (..., 3) are as they were written, bool (...)."""
    return _check(entries) == entries[..., 2]
