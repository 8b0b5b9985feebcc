"""From captions to CLIP's tokens: as transformers makes them, or as open_clip does.

The two differ in what is done to a caption before its bytes are paired. The vocabulary comes from the model's folder or
the hub; none is shipped.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex

from diffpref.errors import UserError, first_line
from diffpref.scorers.parts import weights

if TYPE_CHECKING:
    from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
OPEN_CLIP_MARKS = {"<start_of_text>": START, "<end_of_text>": END}
OPEN_CLIP_WORDS = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def clean(caption: str) -> str:
    """open_clip's cleaning: ftfy, two rounds of HTML entities, one space for any white space, lower case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split()).lower()


@dataclass(frozen=True, eq=False)
class Tokens:
    """CLIP's tokenizer with a length. cleaned: as open_clip does it, else as transformers does."""

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    length: int
    cleaned: bool

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Tokens (n, longest) int64, cut by the tokenizer at `length` with the end kept, filled up with ends."""
        texts = [self._open_clip(each) if self.cleaned else _encodable(each) for each in captions]
        cut = self._tokenizer(texts, truncation=True, max_length=self.length, padding=True, return_tensors="pt")
        return cut["input_ids"]

    @property
    def end(self) -> int:
        """The token that ends a caption, whose features are the caption's."""
        return self.vocabulary[END]

    def __str__(self) -> str:
        import ftfy

        kind = f"open_clip cleaning with ftfy {ftfy.__version__}" if self.cleaned else "no cleaning"
        content = json.dumps([sorted(self.vocabulary.items()), self.merges])
        return f"{kind}, CLIP byte pairs {hashlib.sha256(content.encode()).hexdigest()[:12]}, {self.length} tokens"

    def _open_clip(self, caption: str) -> str:
        """The words that open_clip sees, one space between them: its own marks in our spelling, ours as plain text."""
        words: list[str] = OPEN_CLIP_WORDS.findall(clean(caption))
        return " ".join(OPEN_CLIP_MARKS.get(word, word) for word in words)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import normalizers, pre_tokenizers
        from transformers import CLIPTokenizer

        merges: Any = self.merges  # declared as texts, taken as pairs
        tokenizer = CLIPTokenizer(vocab=self.vocabulary, merges=merges, model_max_length=self.length)
        if self.cleaned:  # the words are found already: nothing is to be changed or cut again
            tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
            steps = [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        return tokenizer


def _encodable(caption: str) -> str:
    """A caption without halves of surrogate pairs, which no tokenizer can read."""
    return caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def load_tokens(place: str, scorer: str, length: int, cleaned: bool) -> Tokens:
    """The tokenizer of a folder or a hub id: its vocab.json and merges.txt, or its tokenizer.json.

    Raises UserError that names the missing files, or the file that is no CLIP vocabulary.
    """
    words, pairs = (weights.look(place, [name], scorer) for name in ("vocab.json", "merges.txt"))
    whole = None if words and pairs else weights.look(place, ["tokenizer.json"], scorer)
    if not whole and not (words and pairs):
        missing = [name for name, file in (("vocab.json", words), ("merges.txt", pairs)) if not file]
        raise UserError(
            f"{scorer}: {place} has no tokenizer: {' and '.join(missing)} missing, and no tokenizer.json; "
            f"name a folder or hub id that has them as {scorer}=WEIGHTS=TOKENIZER"
        )
    try:
        if whole:
            model = json.loads(whole.read_text(encoding="utf-8"))["model"]
            vocabulary, lines = model["vocab"], model["merges"]
        else:
            vocabulary = json.loads(_text(words))
            lines = [line for line in _text(pairs).splitlines() if line and not line.startswith("#version")]
        parts = [line.split() if isinstance(line, str) else line for line in lines]
        if not {START, END} <= set(vocabulary) or any(len(pair) != 2 for pair in parts):
            raise ValueError(f"no {START} and {END} in it, or merges that are no pairs")
        merges = [(left, right) for left, right in parts]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{scorer}: {whole or words} is no CLIP vocabulary: {first_line(error)}") from error
    return Tokens(vocabulary, merges, length, cleaned)


def has_tokenizer(folder: Path) -> bool:
    """Whether a local folder holds the files of a tokenizer."""
    there = [(folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    return there[0] or all(there[1:])


def _text(file: Path | None) -> str:
    return file.read_text(encoding="utf-8") if file else ""
