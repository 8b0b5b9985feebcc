"""Which prompts a model's text encoder does not read to their ends, by its tokenizers alone: no weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffpref.errors import UserError
from diffpref.models import folder

UNLIMITED = 1_000_000  # transformers gives a tokenizer without a limit an enormous one


def overlong_for(place: str, limit: int | None = None) -> Callable[[list[str]], set[int]]:
    """A function that gives the places of prompts with more tokens than are read, special ones included.

    place: a tokenizer's folder, or a pipeline (a folder, `embedded` or a hub id). Of a pipeline's several tokenizers
    the one that reads furthest decides. limit: how many tokens are read; the tokenizer's own limit when not given.
    Raises UserError where there is no tokenizer that loads, or none that has a limit.
    """
    tokenizers = [_load(path) for path in _folders(place)]
    tokenizer = max(tokenizers, key=lambda each: each.model_max_length)
    read = limit or int(tokenizer.model_max_length)
    if read > UNLIMITED:
        raise UserError(f"the tokenizer of {place} tells no limit: give one with --max-tokens")

    def overlong(prompts: list[str]) -> set[int]:
        counted = tokenizer(prompts, truncation=False, verbose=False)["input_ids"]
        return {number for number, tokens in enumerate(counted) if len(tokens) > read}

    return overlong


def _folders(place: str) -> list[Path]:
    """The folders of the tokenizers that a place holds."""
    path = Path(place)
    if (path / "tokenizer_config.json").is_file():
        return [path]
    pipeline = folder.resolve(place, key="--model", files=["model_index.json", "tokenizer*/*"])
    found = sorted(each.parent for each in pipeline.glob("tokenizer*/tokenizer_config.json"))
    if not found:
        raise UserError(f"--model: {place} holds no tokenizer (no tokenizer_config.json in it or in its tokenizer/)")
    return found


def _load(path: Path) -> Any:
    from transformers import AutoTokenizer

    return folder.load(AutoTokenizer, path)
