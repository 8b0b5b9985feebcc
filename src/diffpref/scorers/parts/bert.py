"""From captions to the tokens of an uncased BERT. The vocabulary comes from a folder or the hub; none is shipped."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpref.errors import UserError, first_line
from diffpref.scorers.parts import weights

if TYPE_CHECKING:
    from torch import Tensor

HOME = "google-bert/bert-base-uncased"
FILES = ("vocab.txt", "tokenizer.json")
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ADDED = ("[DEC]", "[ENC]")  # by BLIP, at the vocabulary's end


@dataclass(frozen=True, eq=False)
class BertTokens:
    """BERT's word pieces in lower case, with BLIP's two marks; rows are filled up to `length`."""

    vocabulary: dict[str, int]
    length: int

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens and mask, each (n, length) int64, cut by the tokenizer with the end kept."""
        texts = ["".join(filter(_readable, each)) for each in captions]
        given = {"padding": "max_length", "truncation": True, "max_length": self.length}
        cut = self._tokenizer(texts, **given, return_tensors="pt")
        return cut["input_ids"], cut["attention_mask"]

    @property
    def size(self) -> int:
        """One more than the greatest token."""
        return max(self.vocabulary.values()) + 1 + sum(each not in self.vocabulary for each in ADDED)

    def __str__(self) -> str:
        content = json.dumps(sorted(self.vocabulary.items()))
        return f"BERT word pieces {hashlib.sha256(content.encode()).hexdigest()[:12]}, lower case, {self.length} tokens"

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import BertTokenizer

        tokenizer = BertTokenizer(vocab=self.vocabulary, do_lower_case=True, model_max_length=self.length)
        tokenizer.add_special_tokens({"bos_token": ADDED[0]})
        tokenizer.add_special_tokens({"additional_special_tokens": [ADDED[1]]})
        return tokenizer


def _readable(character: str) -> bool:
    """Whether BERT's first tokenizer keeps a character; transformers' now keeps some that are unassigned."""
    return character in "\t\n\r" or not unicodedata.category(character).startswith("C")


def load_bert_tokens(place: str, scorer: str, length: int) -> BertTokens:
    """The vocabulary of a folder or a hub id: its vocab.txt, or its tokenizer.json. Raises UserError of one line."""
    file = weights.look(place, FILES, scorer)
    if file is None:
        raise UserError(
            f"{scorer}: {place} has no tokenizer: neither vocab.txt nor tokenizer.json; name a folder or hub id that "
            f"has one of them as {scorer}=WEIGHTS=TOKENIZER"
        )
    try:
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            vocabulary = dict(json.loads(content)["model"]["vocab"])
        else:
            vocabulary = {word: number for number, word in enumerate(content.removesuffix("\n").split("\n"))}
        if missing := [each for each in MARKS if each not in vocabulary]:
            raise ValueError(f"it has no {missing[0]}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{scorer}: {file} is no BERT vocabulary: {first_line(error)}") from error
    return BertTokens(vocabulary, length)


def has_vocabulary(folder: Path) -> bool:
    """Whether a local folder holds a BERT's vocabulary."""
    return any((folder / name).is_file() for name in FILES)
