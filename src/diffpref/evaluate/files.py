"""Results are written whole or not at all."""

from pathlib import Path

from diffpref.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it there, so that no reader ever sees half of it.

    Raises UserError where the place cannot be written.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
