"""Makers of small images in memory, of Pick-a-Pic files and datasets on disk, and of datasets without files."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.schema import DatasetSummary, ImageRow, Kind, PairRow, Row
from diffpref.data.writing import ShardWriter

PICKAPIC = pa.schema(
    [
        ("caption", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_1_uid", pa.string()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
    ]
)


def noise(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    """An RGB picture of noise, which no codec makes small."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of the picture in a format."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(seed: int) -> bytes:
    """A JPEG of noise."""
    return encoded(noise(seed), "JPEG")


def truncated_jpeg(seed: int = 0) -> bytes:
    """A JPEG of which the last half is missing."""
    data = jpeg(seed)
    return data[: len(data) // 2]


def bomb(side: int = 50_000) -> bytes:
    """A PNG of a hundred bytes whose header announces `side` x `side` pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def pickapic_row(number: int, **changes: Any) -> dict[str, Any]:
    """One good row of Pick-a-Pic; image 0 is preferred. The same number gives the same row."""
    row = {
        "caption": f"caption {number}",
        "jpg_0": jpeg(2 * number),
        "jpg_1": jpeg(2 * number + 1),
        "label_0": 1.0,
        "label_1": None,
        "has_label": True,
        "image_0_uid": f"a{number}",
        "image_1_uid": f"b{number}",
        "model_0": "model-a",
        "model_1": "model-b",
        "ranking_id": number + 100,
        "user_id": 7,
    }
    return row | changes


def pickapic_rows(good: int, **bad: int) -> list[dict[str, Any]]:
    """`good` good rows, then so many rows with each named fault: `null_caption=2, truncated=1, ...`."""
    faults: dict[str, dict[str, Any]] = {
        "null_caption": {"caption": None},
        "truncated": {"jpg_1": truncated_jpeg()},
        "label_outside": {"label_0": 0.7},
        "tie": {"label_0": 0.5},
        "no_label": {"has_label": False},
    }
    rows = [pickapic_row(number) for number in range(good)]
    for fault, count in bad.items():
        rows += [pickapic_row(len(rows), **faults[fault]) for _ in range(count)]
    return rows


def write_pickapic(
    file: Path, rows: list[dict[str, Any]], drop: tuple[str, ...] = (), rename: dict[str, str] | None = None
) -> Path:
    """Write rows as a Pick-a-Pic file, without the columns in `drop`, with some renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, PICKAPIC).drop_columns(list(drop))
    table = table.rename_columns([(rename or {}).get(name, name) for name in table.column_names])
    pq.write_table(table, file, row_group_size=8)
    return file


def write_trl(file: Path, pairs: list[tuple[str, bytes, bytes]], **columns: list) -> Path:
    """Write (prompt, chosen, rejected) in TRL's columns, images as structs, with any further columns."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "prompt": pa.array([prompt for prompt, _, _ in pairs], pa.string()),
            "chosen": pa.array([{"bytes": chosen, "path": None} for _, chosen, _ in pairs], image),
            "rejected": pa.array([{"bytes": rejected, "path": None} for _, _, rejected in pairs], image),
            **columns,
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=4)
    return file


def light(
    prompts: list[str],
    labels: list[float] | None = None,
    kind: Kind = "pairs",
    texts: dict[str, list[str | None]] | None = None,
    numbers: dict[str, list[float]] | None = None,
) -> PreferenceDataset:
    """A dataset without files, for what looks at the light columns alone; ids are row-0, row-1, ..."""
    count = len(prompts)
    return PreferenceDataset(
        path=Path("nowhere"),
        split="train",
        kind=kind,
        ids=[f"row-{row}" for row in range(count)],
        prompts=prompts,
        labels=np.array(labels or [1.0] * count),
        weights=np.ones(count),
        shards=(),
        texts=texts or {},
        numbers={name: np.array(values) for name, values in (numbers or {}).items()},
    )


def make_images(count: int, side: int = 32, **columns: list) -> list[ImageRow]:
    """Single pictures of noise, two a prompt; `columns` give fields of ImageRow, one value a row."""
    rows = []
    for number in range(count):
        given = {name: values[number] for name, values in columns.items()}
        image = {
            "id": f"image-{number}",
            "prompt": f"a red circle number {number // 2}",
            "image": encoded(noise(number, side, side)),
        }
        rows.append(ImageRow(**{**image, **given}))
    return rows


def write_rows(folder: Path, rows: list[Row], split: str = "train") -> Path:
    """Write pairs or single images, all with the same scores, as a dataset in the normal form."""
    kind: Kind = "pairs" if isinstance(rows[0], PairRow) else "images"
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, split, group_rows=8, kind=kind, scores=list(rows[0].scores)) as writer:
        for row in rows:
            writer.write(row)
    summary = DatasetSummary(
        source="test",
        input="memory",
        split=split,
        options={},
        read=len(rows),
        kept=len(rows),
        ties=sum(row.label == 0.5 for row in rows),
        dropped={},
        bad_rows=[],
        format=f"diffpref-{kind}-1",
    )
    summary.write(folder)
    return folder


def write_tar(file: Path, members: list[tuple[str, bytes] | tarfile.TarInfo], mode: str = "w") -> Path:
    """Write a tar file of (name, content), or of a TarInfo for a member that is not a plain file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, cast(Any, mode), format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return file


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A link, a device or the like, for `write_tar`."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pair_sample(number: int, **described: Any) -> list[tuple[str, bytes]]:
    """The members of a good pair of a WebDataset; the same number gives the same pair."""
    key = f"{number:04d}"
    columns = {"prompt": f"prompt {number}"} | described
    return [
        (f"{key}.chosen.jpg", jpeg(2 * number)),
        (f"{key}.rejected.jpg", jpeg(2 * number + 1)),
        (f"{key}.json", json.dumps(columns).encode()),
    ]


def write_spoilt(folder: Path, nasty: str) -> Path:
    """A dataset of two splits with most of what a check can find, and texts and names that are `nasty`."""
    pairs = [(f"prompt {n}", jpeg(2 * n), jpeg(2 * n + 1)) for n in range(12)]
    pairs += [
        (nasty, jpeg(100), jpeg(101)),
        (nasty, jpeg(101), jpeg(100)),
        ("same", jpeg(102), jpeg(102)),
        ("broken", truncated_jpeg(), b""),
        ("strip", jpeg(103), encoded(noise(0, 4, 600))),
        ("unbroken" * 200, jpeg(104), encoded(noise(1, 600, 300))),
        ("قطة حمراء تجلس على سجادة", encoded(Image.new("RGB", (300, 300))), jpeg(105)),
        ("", jpeg(106), jpeg(107)),
        *[(f"same again {n}", jpeg(200 + n), jpeg(200 + n)) for n in range(12)],
    ]
    ids = [f"{nasty} {n}" for n in range(len(pairs))]
    models = [nasty if n % 2 else f"model-{n % 5}" for n in range(len(pairs))]
    columns = {"chosen_model": models, "rejected_model": models[::-1], nasty: ids, "lable": ids}
    labels = [1.0] * 10 + [0.5, 0.7] + [1.0] * (len(pairs) - 12)
    write_trl(folder / "train-00000.parquet", pairs, id=ids, label=labels, **columns)
    write_trl(folder / "test-00000.parquet", [pairs[0], ("new", pairs[1][1], jpeg(300))])
    return folder
