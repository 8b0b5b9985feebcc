"""What a source asks of the columns of its files, and values of rows as it may rely on them."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from diffpref.data import parquet
from diffpref.errors import UserError, nearest

What = Literal["text", "name", "number", "flag", "image"]
Record = dict[str, Any]
MISSPELT = 0.87  # similarity above which an unknown column is taken for a misspelt optional one
SHOWN = 40  # characters of a wrong value that a message shows


class BadRow(Exception):  # noqa: N818 - it describes the row, as BadImage describes the image
    """This row is left out. `bad` tells a broken row from one left out on purpose."""

    def __init__(self, reason: str, detail: str = "", bad: bool = True) -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail, self.bad = reason, detail, bad


@dataclass(frozen=True)
class Columns:
    """The columns that a source reads: "text", "name" (text or a whole number), "number", "flag" or "image".

    unused: further columns of its schema, so that they are not taken for misspelt ones.
    """

    required: Mapping[str, What]
    optional: Mapping[str, What] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def all(self) -> dict[str, What]:
        """Every column that is read, in order."""
        return {**self.required, **self.optional}

    def known(self, name: str) -> str:
        """The name, where it is a column that is read. Raises UserError with the nearest one where it is not."""
        if name not in self.all:
            raise UserError(f"there is no column {name!r} to name another for: {nearest(name, self.all)}")
        return name


def check_columns(where: str, found: Mapping[str, pa.DataType | None], wanted: Columns) -> None:
    """Raise UserError where a column is missing, misspelt or of a wrong type.

    where: the file, for the message. found: the file's columns; the type is None where it shows row by row only.
    """
    strange = sorted(set(found) - {*wanted.all, *wanted.unused})
    for column in wanted.required:
        if column not in found:
            raise UserError(f"{where} has no column {column!r} ({nearest(column, strange or found)})")
    for column in wanted.optional:
        if column not in found and (close := _misspelt(column, strange)):
            raise UserError(f"{where} has a column {close!r}: rename it to {column!r} or drop it")
    for column, what in wanted.all.items():
        kind = found.get(column)
        if kind is not None and not _fits(kind, what):
            raise UserError(f"{where}: column {column!r} is {kind}, not {_SAID[what]}")


def _misspelt(column: str, strange: list[str]) -> str | None:
    """The strange name that is likely meant to be the column's: nearly the same, or its letters in another order."""
    turned = [name for name in strange if sorted(name) == sorted(column)]
    return next(iter([*turned, *difflib.get_close_matches(column, strange, 1, MISSPELT)]), None)


def typed(record: Record, wanted: Columns) -> Record:
    """The wanted columns of a record, each value None or of its column's type; a name is text, NaN is None.

    Required columns are always there. Raises BadRow where a value is of another type.
    """
    return {
        name: _value(name, record.get(name), what)
        for name, what in wanted.all.items()
        if name in record or name in wanted.required
    }


def text(record: Record, column: str) -> str:
    """The text in a column. Raises BadRow where it is null or blank."""
    if record.get(column) is None:
        raise BadRow(f"null_{column}")
    if not record[column].strip():
        raise BadRow(f"empty_{column}")
    return record[column]


def number(record: Record, column: str, least: float = -math.inf, most: float = math.inf) -> float | None:
    """The number in a column, None where it is null. Raises BadRow where it is infinite or outside the limits."""
    value = record.get(column)
    if value is not None and not (least <= value <= most and math.isfinite(value)):
        limit = "a finite number" + (f" from {least:g}" if math.isfinite(least) else "")
        limit = f"between {least:g} and {most:g}" if math.isfinite(most) else limit
        raise BadRow(f"{column}_outside", f"{column} is {value:g}, not {limit}")
    return value


def winner(record: Record, column: str) -> float:
    """A label of two images: 1 where the first won, 0 where the second did, 0.5 for a tie. Raises BadRow for others."""
    value = record.get(column)
    if value is None:
        raise BadRow("null_label")
    if value not in (0.0, 0.5, 1.0):
        raise BadRow("label_outside", f"{column} is {value:g}, not 0, 0.5 or 1")
    return value


_SAID: dict[What, str] = {
    "text": "text",
    "name": "text or whole numbers",
    "number": "numbers",
    "flag": "true or false",
    "image": "the bytes of images",
}


def _fits(kind: pa.DataType, what: What) -> bool:
    if pa.types.is_null(kind):
        return what != "image"
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return {
        "text": is_text,
        "name": is_text or pa.types.is_integer(kind),
        "number": pa.types.is_floating(kind) or pa.types.is_integer(kind),
        "flag": pa.types.is_boolean(kind),
        "image": parquet.is_image_type(kind),
    }[what]


def _value(column: str, value: Any, what: What) -> Any:
    if value is None:
        return value
    if what == "number":
        return _number(column, value)
    if what == "name" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, {"flag": bool, "image": bytes}.get(what, str)):
        raise BadRow(f"{column}_wrong_type", f"{_shown(value)} is not {_SAID[what]}")
    if isinstance(value, str):
        try:
            value.encode("utf-8")  # JSON can spell half a character, as \ud800, which no file can hold
        except UnicodeEncodeError:
            raise BadRow(f"{column}_not_unicode") from None
    return value


def _number(column: str, value: Any) -> float | None:
    try:
        if isinstance(value, bool):
            raise TypeError
        found = float(value)  # also of text: a CSV file has nothing else
    except (TypeError, ValueError, OverflowError):
        raise BadRow(f"{column}_wrong_type", f"{_shown(value)} is not a number") from None
    return None if math.isnan(found) else found


def _shown(value: Any) -> str:
    return ascii(value)[:SHOWN]
