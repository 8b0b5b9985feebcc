"""Datasets for other tools: TRL's columns, a folder of images with a list, WebDataset tars.

Each is written whole or not at all, in the order of the rows and with the images' original bytes; the same dataset
gives the same bytes. The source of the same kind reads it back: `trl`, `folder`, `webdataset`.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from diffpref.data import parquet
from diffpref.data.columns import type_of
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import BadImage, decode, suffix
from diffpref.data.making import RowWriter, making, whole_already
from diffpref.data.schema import (
    COLUMNS,
    SIDES,
    DatasetSummary,
    Kind,
    PairRow,
    Row,
    as_record,
    exchanged,
    other_side,
    required,
)
from diffpref.data.threads import map_in_order
from diffpref.data.writing import SHARD_BYTES, ShardWriter
from diffpref.errors import UserError
from diffpref.progress import Bar

Format = Literal["trl", "folder", "webdataset"]
FILES_A_FOLDER = 1000  # rows whose images share a folder


def export_dataset(
    dataset: PreferenceDataset,
    output: Path,
    form: Format,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> DatasetSummary:
    """Write the dataset to the folder `output` in another form. shard_bytes: of images, in a file of `trl` or a tar.

    TRL knows no ties and has the better image first: there, ties are left out and counted, and a pair of label below
    0.5 is turned round. Raises UserError where `output` is taken, over 5% of the rows have broken images, or single
    images should become pairs.
    """
    if form == "trl" and dataset.kind != "pairs":
        raise UserError(
            f"{dataset.path} holds single images, and TRL's form is of pairs: export a folder or webdataset"
        )
    options: dict[str, str | float] = {"form": form, "shard_bytes": shard_bytes}
    if form == "folder":
        del options["shard_bytes"]
    if not overwrite and (whole := whole_already(dataset, output, "export", options)):
        return whole
    scores = dataset.score_columns()
    writer = partial(_writer, dataset, form, shard_bytes)
    with (
        making(dataset, output, "export", options, dataset.kind, scores, overwrite, writer) as made,
        Bar(f"export {form}", len(dataset), "rows") as bar,
    ):
        for number, (row, fault) in enumerate(map_in_order(_looked_at, dataset.rows())):
            bar.advance()
            if isinstance(fault, BadImage):
                made.drop_bad(number, f"image_{fault.reason}", str(fault))
            elif form == "trl" and row.label == 0.5:
                made.ties += 1
                made.drop(number, "tie")
            elif form == "trl" and isinstance(row, PairRow) and row.label < 0.5:
                made.keep(exchanged(row))
            else:
                made.keep(row)
    return made.summary()


def _looked_at(row: Row) -> tuple[Row, BadImage | None]:
    for side in SIDES["pairs" if isinstance(row, PairRow) else "images"]:
        try:
            decode(getattr(row, side))
        except BadImage as error:
            return row, error
    return row, None


def _writer(dataset: PreferenceDataset, form: Format, shard_bytes: int, folder: Path) -> RowWriter:
    if form == "trl":
        scores, columns = dataset.score_columns(), _filled(dataset)
        return ShardWriter(folder, dataset.split, shard_bytes=shard_bytes, scores=scores, only=columns)
    if form == "folder":
        return FolderWriter(folder, dataset.kind)
    return TarWriter(folder, dataset.split, dataset.kind, shard_bytes)


def _filled(dataset: PreferenceDataset) -> list[str]:
    """TRL's three columns, the id, and what else holds anything; what is of one image stands for both."""
    filled = {"id"}
    for shard in dataset.shards:
        with parquet.opened(shard.file) as opened:
            for name in opened.schema_arrow.names:
                if type_of("pairs", name) is not None and name not in required("pairs"):
                    column = opened.read([name], use_threads=False).column(0)
                    if column.null_count < len(column):
                        filled.add(name)
    filled |= {other_side(name) for name in filled}
    known = [name for name in (*COLUMNS["pairs"], *dataset.score_columns()) if name in filled]
    return [*required("pairs"), *known]


class FolderWriter:
    """Images as files and `metadata.jsonl` with a line a row, as `datasets.load_dataset` opens. A context manager."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self._folder = folder
        self._kind: Kind = kind
        self._rows = 0
        self._list = (folder / "metadata.jsonl").open("w", encoding="utf-8", newline="\n")

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._list.close()

    def write(self, row: Row) -> None:
        """Add a row: its files, and its line."""
        place = f"images/{self._rows // FILES_A_FOLDER:05d}"
        if self._rows % FILES_A_FOLDER == 0:
            (self._folder / place).mkdir(parents=True)
        names = {}
        for side in SIDES[self._kind]:
            content = getattr(row, side)
            single = side == "image"
            name = f"{place}/{self._rows:08d}{'' if single else f'-{side}'}.{suffix(content)}"
            (self._folder / name).write_bytes(content)
            names["file_name" if single else f"{side}_file_name"] = name
        self._list.write(json.dumps(names | _described(row), ensure_ascii=False, allow_nan=False) + "\n")
        self._rows += 1


class TarWriter:
    """Rows as samples (`KEY.chosen.png`, `KEY.json`, ...) of `<split>-00000.tar`, ... A context manager."""

    def __init__(self, folder: Path, split: str, kind: Kind, shard_bytes: int) -> None:
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._kind: Kind = kind
        self._rows = self._shards = self._written = 0
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def write(self, row: Row) -> None:
        """Add a row; it ends its shard where that has its size."""
        if self._tar is None:
            file = self._folder / f"{self._split}-{self._shards:05d}.tar"
            self._tar = tarfile.open(file, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - _close closes it
            self._shards += 1
        for side in SIDES[self._kind]:
            content = getattr(row, side)
            self._add(f"{suffix(content)}" if side == "image" else f"{side}.{suffix(content)}", content)
        self._add("json", json.dumps(_described(row), ensure_ascii=False, allow_nan=False).encode())
        self._rows += 1
        if self._written >= self._shard_bytes:
            self._close()

    def _add(self, ending: str, content: bytes) -> None:
        assert self._tar is not None
        member = tarfile.TarInfo(f"{self._rows:08d}.{ending}")  # owner 0, time 0: nothing but content decides the bytes
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))
        self._written += len(content)

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
        self._tar, self._written = None, 0


def _described(row: Row) -> dict[str, Any]:
    """The columns of a row but its images; JSON has no number that is not finite, so such a one is null."""
    record = {name: value for name, value in as_record(row).items() if not isinstance(value, dict)}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
