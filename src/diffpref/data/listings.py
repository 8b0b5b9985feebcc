"""Rows from text files: JSON lines, a JSON array, CSV. Their images are files beside them, which the cells name."""

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, AnyStr

from diffpref.data.archives import MAX_BYTES, MAX_TEXT
from diffpref.data.fields import BadRow, Record
from diffpref.errors import UserError
from diffpref.files import stays_inside

SUFFIXES = (".jsonl", ".json", ".csv")
CHUNK = 2**20


def records(file: Path) -> Iterator[Record | BadRow]:
    """The rows of a text file in order, a few in memory at a time. An empty cell of a CSV file is None.

    Raises UserError where the file cannot be read, is no UTF-8 or, but for JSON lines, breaks off.
    """
    with _errors(file):
        if file.suffix.lower() == ".csv":
            yield from _csv(file)
        elif file.suffix.lower() == ".json":
            yield from map(_object, _array(file))
        else:
            yield from _lines(file)


def image(folder: Path, column: str, name: Any) -> bytes | None:
    """The content of an image file that a cell names, None where it names none.

    Raises BadRow where it names a file outside the folder, or one that is absent, too large or unreadable.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise BadRow(f"{column}_wrong_type", f"{ascii(name)[:40]} is not a file name")
    shown = ascii(name)[:200]
    if not stays_inside(name):
        raise BadRow("unsafe_name", f"{column} must stay inside the folder: {shown}")
    file = folder / name
    try:
        if not file.is_file():
            raise BadRow("no_file", f"{column}: {shown}")
        if file.stat().st_size > MAX_BYTES:
            raise BadRow("file_too_large", f"{column}: {shown}")
        return file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that the system cannot hold
        raise BadRow("unreadable_file", f"{column}: {shown}: {getattr(error, 'strerror', None) or error}") from None


def _lines(file: Path) -> Iterator[Record | BadRow]:
    with file.open("rb") as lines:
        for line in _bounded(file, lines):
            if not line.strip():
                continue
            try:
                yield _object(json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:
                yield BadRow("not_json", str(error)[:200])


def _bounded(file: Path, stream: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file, unless one is so long that memory would not hold it."""
    while line := stream.readline(MAX_TEXT + 1):
        if len(line) > MAX_TEXT:
            raise UserError(f"{file} has a line of over {MAX_TEXT} characters")
        yield line


def _object(value: Any) -> Record | BadRow:
    return value if isinstance(value, dict) else BadRow("not_json", "no object")


def _array(file: Path) -> Iterator[Any]:
    """The elements of a JSON array, without holding the whole of it."""
    decoder = json.JSONDecoder()
    with file.open(encoding="utf-8-sig") as stream:
        held, place, more = stream.read(CHUNK).lstrip(), 1, True
        if not held.startswith("["):
            raise UserError(f"{file} holds no JSON array; rows as lines of JSON belong into a .jsonl file")
        while True:
            place = _skipped(held, place, " \t\r\n,")
            if held[place : place + 1] == "]":
                return
            try:
                value, end = decoder.raw_decode(held, place)
                complete = end < len(held)  # a number may go on in the next chunk
            except ValueError:
                complete = False
            if complete:
                yield value
                place = end
                continue
            if not more or len(held) - place > 4 * MAX_TEXT:
                before = held[max(0, place - 40) : place]
                raise UserError(f"{file} is broken or cut short: no JSON after {before!a}")
            held, place = held[place:], 0
            chunk = stream.read(max(CHUNK, len(held)))  # so that a long element is not parsed for each small chunk
            held, more = held + chunk, bool(chunk)


def _skipped(text: str, place: int, characters: str) -> int:
    while text[place : place + 1] and text[place] in characters:
        place += 1
    return place


def _csv(file: Path) -> Iterator[Record | BadRow]:
    csv.field_size_limit(MAX_TEXT)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows: Iterable[list[str]] = csv.reader(_bounded(file, stream), strict=True)
        names: list[str] | None = None
        for cells in rows:
            if not cells:
                continue
            if names is None:
                names = _header(file, cells)
            elif len(cells) != len(names):
                yield BadRow("wrong_cells", f"{len(cells)} cells under {len(names)} columns")
            else:
                yield {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _header(file: Path, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{file} has two columns {twice!r}")
    return names


@contextmanager
def _errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from error
    except csv.Error as error:
        raise UserError(f"{file} is not a readable CSV file: {error}") from error
