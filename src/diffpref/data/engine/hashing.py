"""The SHA-256 of every image, made once for each file of a dataset or folder and kept in the ledger."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from diffpref.data.engine.ledger import Claims, read_table, write_table, writing
from diffpref.data.engine.plan import Question
from diffpref.data.engine.source import Captioned, Images
from diffpref.data.threads import map_in_order
from diffpref.progress import Bar

WAIT = 0.1  # seconds between looks at what other processes are busy with


def image_questions(dataset: Captioned, ledger: Path, shown: bool = True) -> Iterator[Question]:
    """One question for each image, in the order of rows and then sides, with its row's prompt.

    Files that were hashed before are not read again, unless they were written since. Several processes share the files.
    Raises UserError where the ledger cannot be written or an image file cannot be read.
    """
    folder = ledger / "hashes"
    with writing(folder / "claims"):
        claims = Claims(folder / "claims")
    pictures = dataset.pictures
    sides = pictures.sides
    parts = [(folder / f"{name}.parquet", part) for name, part in pictures.parts()]
    there = len(sides) * sum(len(part) for file, part in parts if file.is_file())
    row = 0
    with Bar("hashes", len(sides) * len(pictures), "images", done=there, shown=shown) as bar:
        for file, part in parts:
            fresh = not file.is_file()
            hashes = _hashes(part, file, claims)
            bar.advance(fresh * len(hashes))
            for place, content in enumerate(hashes):
                number, side = row + place // len(sides), sides[place % len(sides)]
                yield Question(dataset.prompts[number], content, row=number, side=side)
            row += len(part)


def _hashes(part: Images, file: Path, claims: Claims) -> list[bytes]:
    """The hashes of one part's images, from the ledger or made now."""
    while True:
        with claims.claim(file.stem) as mine:
            if (table := read_table(file)) is not None:
                return table["sha256"].to_pylist()
            if mine:
                made = list(map_in_order(lambda image: hashlib.sha256(image[2]).digest(), part.iter_images()))
                write_table(file, pa.table({"sha256": pa.array(made, pa.binary(32))}))
                return made
        time.sleep(WAIT)
