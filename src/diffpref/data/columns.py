"""The columns of a file in the normal form: which kind of file they make it, and the light ones with their types."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.data import parquet
from diffpref.data.schema import COLUMNS, SIDES, Kind, is_score, required
from diffpref.errors import UserError, nearest


def type_of(kind: Kind, name: str) -> pa.DataType | None:
    """The type of a column of the normal form, None for one that it does not know."""
    return pa.float64() if is_score(kind, name) else COLUMNS[kind].get(name)


def is_light(kind: Kind, name: str) -> bool:
    """Whether a column is among those that a dataset keeps in memory."""
    if name in ("id", "prompt", "label", "weight", "margin") or is_score(kind, name):
        return type_of(kind, name) is not None
    return name in [f"{side}_{end}" for side in SIDES[kind] for end in ("prompt", "model", "id")]


def kind_of(file: Path, columns: pa.Schema) -> Kind:
    """Whether a file holds pairs or single images. Raises UserError where columns are missing or images no images."""
    names = set(columns.names)
    if not names & {"chosen", "rejected", "image"}:
        near = nearest("image", names)
        raise UserError(f"{file} has neither the columns 'chosen' and 'rejected' nor 'image' ({near})")
    kind: Kind = "images" if "image" in names and not {"chosen", "rejected"} & names else "pairs"
    for name in required(kind):
        if name not in names:
            raise UserError(f"{file} has no column {name!r} ({nearest(name, names - set(required(kind)))})")
    for name in SIDES[kind]:
        if not parquet.is_image_type(columns.field(name).type):
            raise UserError(f"{file}: column {name!r} is {columns.field(name).type}, not images with their bytes")
    return kind


def read_light(file: Path, kind: Kind, opened: pq.ParquetFile) -> pa.Table:
    """A file's light columns with their right types."""
    table = opened.read([name for name in opened.schema_arrow.names if is_light(kind, name)], use_threads=False)
    columns = {}
    for name in table.column_names:
        wanted = type_of(kind, name)
        try:
            columns[name] = table[name].cast(wanted)
        except pa.ArrowException:
            raise UserError(f"{file}: column {name!r} is {table[name].type}, not {wanted}") from None
        if wanted == pa.string():
            _check_text(file, name, columns[name])
    for name, most in (("label", 1.0), ("weight", np.finfo(np.float64).max)):
        if name in columns:
            _check_range(file, name, columns[name].fill_null(1.0).to_numpy(), most)
    return pa.table(columns)


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers as float64 (rows,), NaN where it is null."""
    return column.fill_null(np.nan).to_numpy()


def texts_of(column: pa.ChunkedArray) -> list[str | None]:
    """A column of texts, of which equal ones are one object: of a million rows' prompts few are different."""
    known: dict[str | None, str | None] = {}
    return [known.setdefault(text, text) for chunk in column.chunks for text in chunk.to_pylist()]


def _check_text(file: Path, name: str, column: pa.ChunkedArray) -> None:
    """Refuse bytes that are no text, on which nothing else would: pyarrow looks at them only when they are read."""
    try:
        column.validate(full=True)
    except pa.ArrowException:
        for row, value in enumerate(column.cast(pa.binary()).to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError:
                raise UserError(f"{file} row {row}: the {name} is no text in UTF-8") from None
        raise


def _check_range(file: Path, name: str, values: np.ndarray, most: float) -> None:
    bad = ~((values >= 0) & (values <= most))  # so that nan is bad
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(f"{file} row {row}: the {name} is {values[row]:g}, not between 0 and {most:g}")
