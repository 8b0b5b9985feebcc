"""A source as an importer calls it: with the user's names of columns, and with what its input says of its rows."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffpref.data.fields import Columns
from diffpref.data.schema import Shape
from diffpref.errors import UserError

FUNCTIONS = ("count", "read", "read_from", "shape")


def settled(name: str, source: Any, path: Path, split: str, names: Mapping[str, str]) -> Any:
    """The source module `name`, or what looks like it but has its KIND settled, SCORES, and names for its columns.

    names: the input's column for a column that the source asks for. SCORES are the columns of scores that its rows
    have, LEFT_OUT the columns of the input that nobody reads; a source of a fixed KIND has neither.
    Raises UserError where it has no columns to name, or none of that name, or cannot tell what the input holds.
    """
    if source.KIND and not names:
        return source
    columns: Columns | None = getattr(source, "COLUMNS", None)
    if columns is None:
        raise UserError(f"the source {name} has no columns that could be named")
    for each in names:
        columns.known(each)
    found = dict(vars(source))
    if names:
        found |= {each: partial(found[each], names=names) for each in FUNCTIONS if each in found}
    shape = Shape(source.KIND) if source.KIND else found["shape"](path, split)
    return SimpleNamespace(**found | {"KIND": shape.kind, "SCORES": shape.scores, "LEFT_OUT": shape.left_out})
