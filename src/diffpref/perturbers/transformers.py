"""Any text-to-text model (T5, BART) or chat model of transformers as a perturber, by hub id or folder.

What it is asked is a template with the text and the level in words. A chat model is asked in a chat of one turn.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffpref.errors import UserError
from diffpref.language import (
    RowSampler,
    check_template,
    in_batches,
    known_place,
    load_network,
    load_part,
    plain,
    weights,
    write,
)
from diffpref.perturbers.base import Level, Perturber, PerturbOptions

TAKES = (
    "level",
    "model",
    "revision",
    "template",
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
    "dtype",
    "device",
    "batch_size",
)
VERSION = "1"  # of this module: raise it whenever its texts change
SHARE: dict[Level, str] = {"weak": "one", "medium": "some", "strong": "most"}


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer."""

    network: Any
    tokenizer: Any
    options: PerturbOptions

    def __call__(self, texts: Sequence[str], draws: Sequence[int]) -> list[str]:
        """The model's answer for each text, `batch_size` at a time."""
        return in_batches(self._write, self.options.batch_size, texts, draws)

    def _write(self, texts: Sequence[str], draws: Sequence[int]) -> list[str]:
        asked = [self.options.template.format(prompt=text, share=SHARE[self.options.level]) for text in texts]
        chat = self.tokenizer.chat_template is not None
        if chat:
            turns = [[{"role": "user", "content": text}] for text in asked]
            asked = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = self.tokenizer(
            asked, padding=True, add_special_tokens=not chat, return_token_type_ids=False, return_tensors="pt"
        )
        sampler = RowSampler(draws, self.options.temperature, self.options.top_p)
        tokens = write(
            self.network, inputs.to(self.network.device), sampler, max_new_tokens=self.options.max_new_tokens
        )
        return [plain(text) for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def version(options: PerturbOptions) -> str:
    """Of this module and of the weights. Raises UserError where there is no model or the template is wrong."""
    _check_template(options.template)
    if "{share}" not in options.template:
        print("diffpref: warning: --template has no {share}, so that --level changes nothing", file=sys.stderr)
    return f"{VERSION} {weights(_place(options), options.revision)}"


def load(options: PerturbOptions) -> Perturber:
    """The model. Raises UserError where it does not load or writes no text."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    _check_template(options.template)
    model = _place(options)
    tokenizer = load_part(AutoTokenizer, model, options.revision)
    both_ways = load_part(AutoConfig, model, options.revision).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if both_ways else AutoModelForCausalLM
    tokenizer.padding_side = "right" if both_ways else "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    network = load_network(kind, model, options.revision, options.dtype, options.device)
    return LanguageModel(network, tokenizer, options)


def _place(options: PerturbOptions) -> str:
    return known_place(options.model, "the perturber 'transformers'")


def _check_template(template: str) -> None:
    check_template(template, ["prompt", "share"])
    if "{prompt}" not in template:
        raise UserError("--template: it has no {prompt}, so that the model would not see the text")
