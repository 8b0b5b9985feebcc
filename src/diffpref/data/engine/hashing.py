"""The SHA-256 of every image of a dataset, made once for each of its files and kept in the ledger."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from diffpref.data.dataset import Pictures, PreferenceDataset, Shard
from diffpref.data.engine.ledger import Claims, read_table, write_table, writing
from diffpref.data.engine.plan import Question
from diffpref.data.threads import map_in_order
from diffpref.progress import Bar

WAIT = 0.1  # seconds between looks at what other processes are busy with


def image_questions(dataset: PreferenceDataset, ledger: Path) -> Iterator[Question]:
    """One question for each image, in the order of rows and then sides, with its row's prompt.

    Files that were hashed before are not read again, unless they were written since. Several processes share the files.
    Raises UserError where the ledger cannot be written or an image file cannot be read.
    """
    folder = ledger / "hashes"
    with writing(folder / "claims"):
        claims = Claims(folder / "claims")
    sides = len(dataset.sides)
    files = [folder / f"{_identity(shard)}.parquet" for shard in dataset.shards]
    there = sides * sum(sum(shard.groups) for shard, file in zip(dataset.shards, files, strict=True) if file.is_file())
    with Bar("hashes", sides * len(dataset), "images", done=there) as bar:
        for shard, file in zip(dataset.shards, files, strict=True):
            fresh = not file.is_file()
            hashes = _hashes(shard, dataset, file, claims)
            bar.advance(fresh * len(hashes))
            for place, content in enumerate(hashes):
                row, side = shard.first + place // sides, dataset.sides[place % sides]
                yield Question(dataset.prompts[row], content, row=row, side=side)


def _hashes(shard: Shard, dataset: PreferenceDataset, file: Path, claims: Claims) -> list[bytes]:
    """The hashes of one file's images, from the ledger or made now."""
    while True:
        with claims.claim(file.stem) as mine:
            if (table := read_table(file)) is not None:
                return table["sha256"].to_pylist()
            if mine:
                images = Pictures((shard,), dataset.sides).iter_images()
                made = list(map_in_order(lambda image: hashlib.sha256(image[2]).digest(), images))
                write_table(file, pa.table({"sha256": pa.array(made, pa.binary(32))}))
                return made
        time.sleep(WAIT)


def _identity(shard: Shard) -> str:
    """A name for a file's content, from what changes whenever it is written; `changed` alone is kept by some copies."""
    stat = shard.file.stat()
    told = f"{shard.file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}"
    return hashlib.sha256(told.encode()).hexdigest()[:24]
