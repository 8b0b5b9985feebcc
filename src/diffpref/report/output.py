"""Where a page goes: one file with all that it shows, or a folder with its pictures beside it."""

from pathlib import Path

from diffpref.errors import UserError
from diffpref.report.parts import GENERATOR

INDEX = "index.html"
SUFFIXES = (".html", ".htm")


def is_file(output: Path) -> bool:
    """Whether the page is to be one file."""
    return output.suffix.lower() in SUFFIXES


def refuse_foreign(output: Path) -> None:
    """Raise UserError where `output` exists and is no page, or no folder of a page, that diffpref wrote."""
    if not output.exists() or (output.is_dir() and not is_file(output) and not any(output.iterdir())):
        return
    if output.is_dir() == is_file(output):
        kind = "a folder" if output.is_dir() else "a file"
        raise UserError(f"--output: {output} is {kind}; a page is PAGE.html or a folder for it")
    if not _is_ours(output if is_file(output) else output / INDEX):
        raise UserError(f"--output: {output} exists and is no page of diffpref; choose another name")


def _is_ours(page: Path) -> bool:
    try:
        with page.open("rb") as file:
            return GENERATOR.encode() in file.read(2000)
    except OSError:
        return False
