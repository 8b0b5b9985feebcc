"""Prompt sets: a text file with a prompt a line, a JSON array, a dataset, or the embedded world's held-out prompts."""

import json
from pathlib import Path

from diffpref.errors import UserError


def read_prompts(source: str) -> list[str]:
    """The prompts of a text file or a JSON array (blank ones are left out), of `embedded`, or of a dataset, each once.

    Raises UserError where the file is missing, not text, no array of texts, or holds no prompt.
    """
    from diffpref.data.dataset import PreferenceDataset
    from diffpref.embedded import PROMPTS

    path = PROMPTS if source == "embedded" else Path(source)
    if path.is_dir() or path.suffix == ".parquet":
        return list(dict.fromkeys(PreferenceDataset.open(path).prompts))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {path} cannot be read: {error}") from error
    lines = _array(path, text) if path.suffix == ".json" else text.split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts: {path} holds no prompt")
    return prompts


def _array(path: Path, text: str) -> list[str]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"prompts: {path} cannot be read as JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise UserError(f"prompts: {path} is no array of prompts")
    return found
