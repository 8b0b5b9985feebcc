"""Where a page goes: one file with all that it shows, or a folder with its pictures beside it."""

from pathlib import Path

from diffpref.errors import UserError
from diffpref.report.parts import GENERATOR
from diffpref.report.pictures import FOLDER

INDEX = "index.html"
SUFFIXES = (".html", ".htm")


def is_file(output: Path) -> bool:
    """Whether the page is to be one file."""
    return output.suffix.lower() in SUFFIXES


def refuse_foreign(output: Path) -> None:
    """Raise UserError where `output` exists and is no page, or no folder of a page, that diffpref wrote."""
    if not output.exists():
        return
    if output.is_dir() == is_file(output):
        kind = "a folder" if output.is_dir() else "a file"
        raise UserError(f"--output: {output} is {kind}; a page is PAGE.html or a folder for it")
    try:
        held = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
        ours = not held or _is_ours(output if is_file(output) else output / INDEX)
    except OSError as error:
        raise UserError(f"--output: cannot read {output}: {error.strerror}") from None
    if not ours:
        raise UserError(f"--output: {output} exists and is no page of diffpref; choose another name")
    if output.is_dir() and (others := held - {INDEX, FOLDER}):
        raise UserError(
            f"--output: {output} holds {min(others)} beside a page, which would be lost; choose another name"
        )


def _is_ours(page: Path) -> bool:
    if not page.is_file():
        return False
    with page.open("rb") as file:
        return GENERATOR.encode() in file.read(2000)
