"""Pick-a-Pic v1 and v2: a caption, the bytes of two images and who won, in parquet files, tar shards or JSON.

`label_0` is 1 where image 0 was preferred, 0 where image 1 was, 0.5 for a tie (image 0 then stands as chosen). Rows
with `has_label` false were never judged: they are left out and counted, without being held against the file.
`caption_0` and `caption_1`, which no file of Pick-a-Pic has, become the images' own captions (DCPO).
A sample of a tar shard is `KEY.jpg_0`, `KEY.jpg_1` and `KEY.json`; the images of JSON are files beside it, which
`jpg_0` and `jpg_1` name.
"""

import difflib
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa

from diffpref.data import parquet, tables
from diffpref.data.fields import BadRow, Columns, Record
from diffpref.data.schema import Dropped, Found, Kind, PairRow
from diffpref.errors import UserError, nearest

KIND: Kind = "pairs"
SHARDS = (".parquet", ".tar")
REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0")
OPTIONAL = ("label_1", "has_label", "image_0_uid", "image_1_uid", "model_0", "model_1", "ranking_id", "user_id")
CAPTIONS = ("caption_0", "caption_1")  # of each image, as DCPO's script asks for them; where there are any
UNUSED = (
    "are_different",
    "best_image_uid",
    "created_at",
    "image_0_url",
    "image_1_url",
    "num_example_per_prompt",
)
COLUMNS = Columns(  # as tables take them: tar and JSON files, and parquet with other names
    {"caption": "text", "jpg_0": "image", "jpg_1": "image", "label_0": "number"},
    {**dict.fromkeys(OPTIONAL, "name"), **dict.fromkeys(CAPTIONS, "text"), "label_1": "number", "has_label": "flag"},
    UNUSED,
)
LABELS = (0.0, 0.5, 1.0)
MISSPELT = 0.87  # similarity above which an unknown column is taken for a misspelt optional one


def count(path: Path, split: str, names: tables.Names | None = None) -> int:
    """The number of rows. Raises UserError where a file is broken or any of them lacks a column."""
    if names or not tables.is_parquet(path, split):
        return tables.count(path, split, COLUMNS, names)
    total = 0
    for file in parquet.files_of_split(path, split):
        with parquet.opened(file) as opened:
            _check_columns(file, opened.schema_arrow)
            total += opened.metadata.num_rows
    return total


def read(path: Path, split: str, names: tables.Names | None = None) -> Iterator[Found | Dropped]:
    """Every row as a pair or with the reason why it is none. Raises UserError as `count`."""
    return read_from(path, split, 0, names)


def read_from(path: Path, split: str, start: int, names: tables.Names | None = None) -> Iterator[Found | Dropped]:
    """As `read`, without the first `start` rows, which are not read from the disk where they are in parquet files."""
    if names or not tables.is_parquet(path, split):
        yield from islice(tables.read(path, split, COLUMNS, _found, names), start, None)
        return
    for file in parquet.files_of_split(path, split):
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        with parquet.opened(file) as opened:
            _check_columns(file, opened.schema_arrow)
            columns = [column for column in (*REQUIRED, *OPTIONAL, *CAPTIONS) if column in opened.schema_arrow.names]
            count = opened.metadata.num_rows
        skipped = min(start, count)
        for number, row in enumerate(parquet.rows(file, columns, skipped), skipped):
            yield _read_row(name, number, row)
        start -= skipped


def _read_row(file: str, number: int, row: dict) -> Found | Dropped:
    if row.get("has_label") is False:
        return Dropped(file, number, "no_label", bad=False)
    if fault := _fault(row):
        return Dropped(file, number, *fault)
    chosen, rejected = (1, 0) if row["label_0"] == 0 else (0, 1)
    pair = PairRow(
        id=f"{Path(file).with_suffix('').as_posix()}-{number}",
        prompt=row["caption"],
        chosen=parquet.image_bytes(row[f"jpg_{chosen}"]),
        rejected=parquet.image_bytes(row[f"jpg_{rejected}"]),
        chosen_prompt=row.get(f"caption_{chosen}"),
        rejected_prompt=row.get(f"caption_{rejected}"),
        label=0.5 if row["label_0"] == 0.5 else 1.0,
        chosen_id=_text(row.get(f"image_{chosen}_uid")),
        rejected_id=_text(row.get(f"image_{rejected}_uid")),
        chosen_model=_text(row.get(f"model_{chosen}")),
        rejected_model=_text(row.get(f"model_{rejected}")),
        source="pickapic",
        group_id=_text(row.get("ranking_id")),
        annotator_id=_text(row.get("user_id")),
    )
    return Found(file, number, pair, turned=chosen == 1)


def _found(record: Record, name: str) -> Found:
    """The pair of a record of a table."""
    row = _read_row("record", 0, record)
    if isinstance(row, Dropped):
        raise BadRow(row.reason, row.detail, row.bad)
    return replace(row, record=replace(row.record, id=name))


def _fault(row: dict) -> tuple[str, str] | None:
    """The reason and its detail why a row is no pair, or None."""
    caption, label, other = row["caption"], row["label_0"], row.get("label_1")
    if caption is None:
        return "null_caption", ""
    if not caption.strip():
        return "empty_caption", ""
    if label is None or math.isnan(label):
        return "null_label", ""
    if label not in LABELS:
        return "label_outside", f"label_0 is {label:g}, not 0, 0.5 or 1"
    if other is not None and label + other != 1:
        return "labels_disagree", f"label_0 is {label:g} and label_1 is {other:g}"
    return None


def _check_columns(file: Path, schema: pa.Schema) -> None:
    names = set(schema.names)
    known = {*REQUIRED, *OPTIONAL, *CAPTIONS, *UNUSED}
    strange = sorted(names - known)
    images = [field.name for field in schema if parquet.is_image_type(field.type)]
    if not images and {"caption", "label_0"} <= names:
        raise UserError(f"{file} holds no images (no columns jpg_0, jpg_1): import the variant of Pick-a-Pic with them")
    for column in REQUIRED:
        if column not in names:
            raise UserError(f"{file} has no column {column!r} ({nearest(column, strange or names)})")
    for column in OPTIONAL:
        if column not in names and (close := difflib.get_close_matches(column, strange, 1, MISSPELT)):
            raise UserError(f"{file} has a column {close[0]!r}: rename it to {column!r} or drop it")
    for column in ("jpg_0", "jpg_1"):
        if not parquet.is_image_type(schema.field(column).type):
            raise UserError(f"{file}: column {column!r} is {schema.field(column).type}, not the bytes of images")
    for column, fits, wanted in (
        ("caption", _is_text, "text"),
        ("caption_0", _is_text, "text"),
        ("caption_1", _is_text, "text"),
        ("label_0", _is_number, "numbers"),
        ("label_1", _is_number, "numbers"),
        ("has_label", pa.types.is_boolean, "true or false"),
    ):
        if column in names and not fits(schema.field(column).type):
            raise UserError(f"{file}: column {column!r} is {schema.field(column).type}, not {wanted}")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _text(value: object) -> str | None:
    return None if value is None else str(value)
