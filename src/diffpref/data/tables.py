"""Rows of a dataset's files as records by column, whatever holds them: parquet, JSON, CSV, or tar files of samples.

A source says which columns it reads and makes a row of a record; all else is here: files by split, columns checked at
once where a file tells their types and row by row where it does not, renamed columns, images that are files beside.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from diffpref.data import archives, listings, parquet
from diffpref.data.fields import BadRow, Columns, Record, check_columns, typed
from diffpref.data.schema import Dropped, Found, Row
from diffpref.errors import UserError, nearest

Names = Mapping[str, str]  # the file's column for a column that a source asks for, where the user renames it
TARS = (".tar", ".tar.gz", ".tgz")
Make = Callable[[Record, str], Row | Found]


def count(path: Path, split: str, wanted: Columns, names: Names | None = None) -> int:
    """The number of rows of the files of a split. Raises UserError where one of them cannot be read as wanted."""
    total = 0
    for file in files(path, split):
        check(file, wanted, names)
        total += rows_of(file)
    return total


def read(path: Path, split: str, wanted: Columns, make: Make, names: Names | None = None) -> Iterator[Found | Dropped]:
    """Every row of the files of a split, made by `make` of its record and a name for it, or why it is left out.

    The record has the wanted columns, typed; images are bytes, None where there is none. `make` raises BadRow, and
    gives a Found where it has more to tell than the row; its place is filled in here. Raises UserError as `count`.
    """
    for file in files(path, split):
        check(file, wanted, names)
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        for number, record in enumerate(records(file, wanted, names)):
            try:
                if isinstance(record, BadRow):
                    raise record
                made = make(record, record.pop(archives.KEY, None) or f"{_stem(name)}-{number}")
            except BadRow as fault:
                yield Dropped(name, number, fault.reason, fault.detail, fault.bad)
            else:
                found = made if isinstance(made, Found) else Found(name, number, made)
                yield replace(found, file=name, row=number)


def check(file: Path, wanted: Columns, names: Names | None = None) -> None:
    """Raise UserError where the file has rows, and their columns are not those that are wanted."""
    found = columns(file)
    if found is None:
        return
    for column in (names or {}).values():
        if column not in found:
            raise UserError(f"{file} has no column {column!r} ({nearest(column, found)})")
    unused = {name: kind for name, kind in found.items() if name not in (names or {}).values()}
    renamed = {name: found[column] for name, column in (names or {}).items()}
    check_columns(str(file), {**unused, **renamed}, wanted)


def columns(file: Path) -> dict[str, pa.DataType | None] | None:
    """The file's columns, None where it has no row; a type is None where only its rows can tell it.

    The first sample tells those of a tar file, every row those of a text file.
    """
    if is_tar(file):
        first = next((each for each in archives.samples(file, lambda _: True) if isinstance(each, dict)), None)
        return None if first is None else dict.fromkeys(name for name in first if name != archives.KEY)
    if _is_listing(file):
        return dict.fromkeys(_listed(file)[1]) or None
    with parquet.opened(file) as opened:
        return {each.name: each.type for each in opened.schema_arrow}


def rows_of(file: Path) -> int:
    """How many rows `records` gives."""
    if is_tar(file):
        return sum(1 for _ in archives.samples(file, lambda _: False))
    if _is_listing(file):
        return _listed(file)[0]
    with parquet.opened(file) as opened:
        return opened.metadata.num_rows


def records(file: Path, wanted: Columns, names: Names | None = None) -> Iterator[Record | BadRow]:
    """The rows of a file as records of the wanted columns that it has, or what is wrong with them."""
    names = names or {}
    taken = set(names.values())  # what stands in for another column no longer stands for itself
    source = {name: names.get(name, name) for name in wanted.all if name in names or name not in taken}
    for found in _records(file, source, wanted):
        if isinstance(found, BadRow):
            yield found
            continue
        try:
            record = {name: found[column] for name, column in source.items() if column in found}
            if _is_listing(file):
                record |= {
                    name: listings.image(file.parent, name, record[name])
                    for name, what in wanted.all.items()
                    if what == "image" and name in record
                }
            yield typed(record, wanted) | {key: found[key] for key in (archives.KEY,) if key in found}
        except BadRow as fault:
            yield fault


def _records(file: Path, source: Names, wanted: Columns) -> Iterator[Record | BadRow]:
    if is_tar(file):
        yield from archives.samples(file, set(source.values()).__contains__)
    elif _is_listing(file):
        yield from listings.records(file)
    else:
        with parquet.opened(file) as opened:
            present = [column for column in dict.fromkeys(source.values()) if column in opened.schema_arrow.names]
        images = {source[name] for name, what in wanted.all.items() if what == "image" and name in source}
        for record in parquet.rows(file, present):
            yield {name: parquet.image_bytes(cell) if name in images else cell for name, cell in record.items()}


def files(path: Path, split: str) -> list[Path]:
    """The files to read: `path` itself, or of a folder the parquet files of the split, else its tar or JSON files.

    Where the folder holds one split it is taken, whatever its name. Raises UserError where there are no files, or
    several splits and not this one.
    """
    if path.is_dir() and not any(path.rglob("*.parquet")):
        for endings in (TARS, (".jsonl",), (".json",)):
            if found := [file for file in sorted(path.rglob("*")) if _is_shown(file, path, endings)]:
                return _of_split(path, found, split)
        raise UserError(f"{path} holds no parquet, tar or JSON files")
    return parquet.files_of_split(path, split)


def is_parquet(path: Path, split: str) -> bool:
    """Whether what `files` finds is parquet."""
    first = files(path, split)[0]
    return not is_tar(first) and not _is_listing(first)


def is_tar(file: Path) -> bool:
    """Whether a file's name is that of a tar file, plain or gzipped."""
    return file.name.lower().endswith(TARS)


def _is_shown(file: Path, path: Path, endings: tuple[str, ...]) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
    return file.name.lower().endswith(endings) and not hidden and file.is_file()


def _of_split(path: Path, found: list[Path], split: str) -> list[Path]:
    splits: dict[str, list[Path]] = {}
    for file in found:
        splits.setdefault(parquet.split_of(Path(_stem(file.name) + ".parquet")), []).append(file)
    if len(splits) == 1:
        return found
    if split not in splits:
        raise UserError(f"{path} holds the splits {', '.join(sorted(splits))}: choose one of them with --split")
    return splits[split]


def _is_listing(file: Path) -> bool:
    return file.suffix.lower() in listings.SUFFIXES


def _listed(file: Path) -> tuple[int, tuple[str, ...]]:
    """The number of rows of a text file and their columns, for which it has to be read once."""
    try:
        changed = file.stat()
    except OSError as error:
        raise UserError(f"{file} does not exist" if not file.exists() else f"cannot read {file}: {error}") from error
    return _looked_through(file, changed.st_mtime_ns, changed.st_size)


@lru_cache(64)
def _looked_through(file: Path, changed: int, size: int) -> tuple[int, tuple[str, ...]]:
    total, found = 0, {}
    for record in listings.records(file):
        total += 1
        found |= dict.fromkeys(record if isinstance(record, dict) else ())
    return total, tuple(found)


def _stem(name: str) -> str:
    """A file's name without what tells its format."""
    for ending in TARS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return Path(name).with_suffix("").as_posix()
