"""Prompt sets: text files, lists in JSON, HPDv2's benchmark, PartiPrompts, Pick-a-Pic, datasets, the embedded world's.

A prompt may have a category, by which comparisons are broken down: HPDv2's style, PartiPrompts' Category.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffpref.errors import UserError

log = logging.getLogger("diffpref")
PARTI = ("Prompt", "Category", "Challenge", "Note")  # the columns of PartiPrompts.tsv


@dataclass(frozen=True)
class Prompt:
    """A text to draw, and its kind, if the set has kinds."""

    text: str
    category: str | None = None


def read_prompts(source: str, split: str | None = None) -> list[Prompt]:
    """The prompts of a source, each once, in its order; blank ones are left out.

    `embedded`: the held-out prompts of the embedded world. A text file: one a line. A JSON file: an array of texts. A
    folder of STYLE.json: HPDv2's benchmark, the style as category. A .tsv file: PartiPrompts (google-research/parti).
    A .parquet file or a folder of such: a dataset in the normal form or Pick-a-Pic; `split` of it.
    Raises UserError where a file is missing, is not of its form, or holds no prompt.
    """
    from diffpref.embedded import PROMPTS

    path = PROMPTS if source == "embedded" else Path(source)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet"))):
        return _each_once(path, ((text, None) for text in _of_tables(path, split)), told=False)
    if split is not None:
        raise UserError(f"prompts: {path} has no splits")
    if path.is_dir():
        if not any(path.glob("*.json")):
            raise UserError(f"prompts: {path} holds neither parquet files nor lists of prompts (STYLE.json)")
        styles = ((text, file.stem) for file in sorted(path.glob("*.json")) for text in _array(file))
        return _each_once(path, styles)
    if path.suffix == ".json":
        return _each_once(path, ((text, None) for text in _array(path)))
    if path.suffix == ".tsv":
        return _each_once(path, _parti(path))
    return _each_once(path, ((line, None) for line in _text(path).split("\n")))


def _each_once(path: Path, found: Iterator[tuple[str, str | None]], told: bool = True) -> list[Prompt]:
    """The prompts, each with its first category; blank ones and repetitions, whose images would be equal, left out."""
    prompts: dict[str, Prompt] = {}
    count = 0
    for text, category in found:
        stripped = text.strip()
        if not stripped:
            continue
        try:
            stripped.encode("utf-8")  # JSON can spell half a character, which no file can hold
        except UnicodeEncodeError:
            raise UserError(f"prompts: {path}: not valid Unicode: {stripped[:40]!r}") from None
        count += 1
        prompts.setdefault(stripped, Prompt(stripped, category))
    if not prompts:
        raise UserError(f"prompts: {path} holds no prompt")
    if told and count > len(prompts):
        log.warning("%d of %d prompts of %s are repetitions and are left out", count - len(prompts), count, path)
    return list(prompts.values())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {path} cannot be read: {error}") from error


def _array(path: Path) -> list[str]:
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"prompts: {path} cannot be read as JSON: {error}") from error
    if not isinstance(found, list):
        raise UserError(f"prompts: {path} is no array of prompts but {_kind(found)}")
    for place, each in enumerate(found):
        if not isinstance(each, str):
            raise UserError(f"prompts: {path} is no array of prompts: element {place} is {_kind(each)}")
    return found


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a text", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number")


def _parti(path: Path) -> Iterator[tuple[str, str | None]]:
    """(prompt, category) of each row. Quotes stand for themselves, as in the published file; tabs end a column."""
    lines = _text(path).split("\n")
    header = lines[0].rstrip("\r").split("\t")
    if "Prompt" not in header:
        raise UserError(f"prompts: {path} has no column Prompt: its first line should be {' | '.join(PARTI)}")
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) > len(header):
            raise UserError(f"prompts: {path} line {number} has {len(cells)} columns, the first line {len(header)}")
        row = dict(zip(header, cells, strict=False))
        if not row.get("Prompt", "").strip():
            raise UserError(f"prompts: {path} line {number} has no prompt")
        yield row["Prompt"], row.get("Category", "").strip() or None


def _of_tables(path: Path, split: str | None) -> Iterator[str]:
    """The prompts of a dataset in the normal form, or the captions of Pick-a-Pic, of whose columns no other is read."""
    from diffpref.data import parquet
    from diffpref.data.dataset import PreferenceDataset, split_names

    names = split_names(path)
    wanted = split or (names[0] if len(names) == 1 else "train")
    with parquet.opened(parquet.files_by_split(path)[names[0]][0]) as first:
        columns = first.schema_arrow.names
    if "prompt" in columns or "caption" not in columns:
        yield from PreferenceDataset.open(path, wanted).prompts
        return
    if wanted not in names:
        raise UserError(f"prompts: {path} holds the splits {', '.join(names)}: choose one of them with --split")
    for file in parquet.files_by_split(path)[wanted]:
        for row in parquet.rows(file, ["caption"]):
            if isinstance(row["caption"], str):
                yield row["caption"]
