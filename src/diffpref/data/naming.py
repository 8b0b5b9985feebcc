"""What a source may tell beyond its functions: the shape of its rows, and columns that the user gives another name."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffpref.data.fields import Columns
from diffpref.data.schema import Shape
from diffpref.errors import UserError


def with_names(name: str, source: Any, names: Mapping[str, str]) -> Any:
    """The source module `name` with its functions bound to the user's names of columns: wanted column -> the input's.

    Raises UserError where the source has no columns to name, or none of that name.
    """
    if not names:
        return source
    columns: Columns | None = getattr(source, "COLUMNS", None)
    if columns is None:
        raise UserError(f"the source {name} has no columns that could be named")
    for each in names:
        columns.known(each)
    bound = {
        each: partial(value, names=names) for each, value in vars(source).items() if each in ("count", "read", "shape")
    }
    return SimpleNamespace(**{"KIND": source.KIND, **bound})


def shape_of(source: Any, path: Path, split: str) -> Shape:
    """What rows the source gives: its KIND, or what its `shape` says of this input where that is None."""
    return Shape(source.KIND) if source.KIND else source.shape(path, split)
