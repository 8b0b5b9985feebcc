"""DIPPER (arXiv 2303.13408), the paraphraser with which DCPO (arXiv 2502.06023) perturbs captions, as its
`perturb_caption.py` calls it: three sentences at a time, the prefix growing with what was written, top_p 0.75.

Ours differs in that texts go in batches, each row draws for itself, and sentences are split by rules of our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffpref.draws import draw_seed
from diffpref.language import RowSampler, in_batches, known_place, load_network, load_part, plain, weights, write
from diffpref.perturbers.base import Level, Perturber, PerturbOptions

TAKES = ("level", "model", "revision", "tokenizer", "seed", "dtype", "device", "batch_size")
VERSION = "1"  # of this module: raise it whenever its texts change
MODEL, TOKENIZER = "kalpeshk2011/dipper-paraphraser-xxl", "google/t5-v1_1-xxl"
TOOL = "the perturber 'dipper'"
PREFIX = "Paraphrase and perturb the following image caption."
DIVERSITY: dict[Level, int] = {"weak": 40, "medium": 60, "strong": 80}  # lexical; that of order is 0
WINDOW = 3  # sentences that are rewritten at once
TOP_P, MAX_LENGTH = 0.75, 256
# An end of a sentence: its mark, with what closes after it, before a space and something that a sentence starts with.
END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*(\s+)(?=[\"'“‘(\[]*[A-Z0-9])")
NO_END = re.compile(  # an abbreviation or an initial, with what follows
    r"(?:^|[\s(\[\"'“‘])(?:(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|vs|etc|approx|e\.g|i\.e|cf|ca|[A-Z])\.\s.|(?:No|Nr|Fig|Vol)\.\s\d)$"
)


@dataclass(frozen=True)
class Dipper:
    """The paraphraser with its tokenizer."""

    network: Any
    tokenizer: Any
    options: PerturbOptions

    def __call__(self, texts: Sequence[str], draws: Sequence[int]) -> list[str]:
        """Each text paraphrased, `batch_size` at a time."""
        return in_batches(self._paraphrase, self.options.batch_size, texts, draws)

    def _paraphrase(self, texts: Sequence[str], draws: Sequence[int]) -> list[str]:
        waiting = [windows(text) for text in texts]
        outputs: list[list[str]] = [[] for _ in texts]
        for number in range(max(map(len, waiting), default=0)):
            rows = [row for row, sentences in enumerate(waiting) if number < len(sentences)]
            asked = [model_input(waiting[row][number], outputs[row], self.options.level) for row in rows]
            answers = self._write(asked, [draw_seed(draws[row], "window", number) for row in rows])
            for row, answer in zip(rows, answers, strict=True):
                outputs[row].append(answer)
        return [plain(" ".join(pieces)) for pieces in outputs]

    def _write(self, asked: list[str], draws: list[int]) -> list[str]:
        inputs = self.tokenizer(asked, padding=True, return_tensors="pt").to(self.network.device)
        tokens = write(self.network, inputs, RowSampler(draws, top_p=TOP_P), max_length=MAX_LENGTH)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def model_input(window: str, before: Sequence[str], level: Level) -> str:
    """What the model reads to rewrite a window of sentences; `before` is what it wrote for the windows before it."""
    prefix = " ".join([PREFIX, *before])
    return f"lexical = {100 - DIVERSITY[level]}, order = 100 {prefix} <sent> {window} </sent>"


def windows(text: str) -> list[str]:
    """The text on one line, three sentences at a time."""
    found = sentences(text)
    return [" ".join(found[first : first + WINDOW]) for first in range(0, len(found), WINDOW)]


def sentences(text: str) -> list[str]:
    """The sentences of a text, of which there is at least one where there is a word.

    The original splits with nltk's punkt, which has learnt its abbreviations; here they are the few of `NO_END`, and a
    sentence starts with a capital or a digit.
    """
    text, found, start = plain(text), [], 0
    for end in END.finditer(text):
        if not NO_END.search(text[start : end.end() + 1]):
            found.append(text[start : end.start(1)])
            start = end.end(1)
    return [*found, text[start:]] if text[start:] else found


def version(options: PerturbOptions) -> str:
    """Of this module, the weights and the tokenizer. Raises UserError where they are nowhere."""
    model, tokenizer = _places(options)
    return " ".join([VERSION, weights(model, options.revision), *([weights(tokenizer)] if tokenizer != model else [])])


def load(options: PerturbOptions) -> Perturber:
    """The paraphraser. Raises UserError where it does not load."""
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    model, place = _places(options)
    tokenizer = load_part(AutoTokenizer, place, option="--tokenizer")
    tokenizer.padding_side = "right"
    network = load_network(T5ForConditionalGeneration, model, options.revision, options.dtype, options.device)
    return Dipper(network, tokenizer, options)


def _places(options: PerturbOptions) -> tuple[str, str]:
    """Where model and tokenizer are."""
    model = known_place(options.model or MODEL, TOOL)
    own = any((Path(model) / name).is_file() for name in ("tokenizer.json", "spiece.model"))
    return model, known_place(options.tokenizer or (model if own else TOKENIZER), TOOL, "--tokenizer")
