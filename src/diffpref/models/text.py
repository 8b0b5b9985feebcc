"""A tokenizer with its text encoder, frozen, loaded when first used: what the families' text parts are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from diffpref.models import folder


@dataclass
class TextPart:
    """One of a pipeline's text encoders, on a device.

    number: "" for text_encoder/ and tokenizer/, "_2" for text_encoder_2/ and tokenizer_2/, and so on.
    kind, tokenizer_kind: their classes in transformers. Text takes 0.2% of a step's work, and rows of a store in fp32
    serve runs of any precision, so the weights are fp32 unless `dtype` says otherwise.
    """

    pipeline: Path
    number: str
    device: torch.device
    kind: str = "CLIPTextModel"
    tokenizer_kind: str = "CLIPTokenizer"
    dtype: torch.dtype = torch.float32
    limit: int | None = None  # tokens, special ones included; the tokenizer's own limit when not given

    def __post_init__(self) -> None:
        self.path = folder.component(self.pipeline, f"text_encoder{self.number}")
        self.tokenizer_path = folder.component(self.pipeline, f"tokenizer{self.number}")

    @cached_property
    def config(self) -> dict[str, Any]:
        return folder.read_json(self.path / "config.json")

    @cached_property
    def encoder(self) -> Any:
        import transformers

        loaded = folder.load(getattr(transformers, self.kind), self.path, torch_dtype=self.dtype)
        return loaded.to(self.device).eval().requires_grad_(False)

    def release(self) -> None:
        """Let go of the weights; they are loaded again when they are needed."""
        self.__dict__.pop("encoder", None)

    @cached_property
    def tokenizer(self) -> Any:
        import transformers

        return folder.load(getattr(transformers, self.tokenizer_kind), self.tokenizer_path)

    @property
    def length(self) -> int:
        """How many tokens the encoder reads."""
        return self.limit or self.tokenizer.model_max_length

    def tokens(self, prompts: list[str]) -> Int[Tensor, "n length"]:
        """Token ids (n, length) int64 on the device: cut at the limit, or filled up to it."""
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids.to(self.device)

    def overlong(self, prompts: list[str]) -> set[int]:
        """The places of prompts with more tokens than the encoder reads, special ones included."""
        counted = self.tokenizer(prompts, truncation=False, verbose=False)["input_ids"]
        return {place for place, tokens in enumerate(counted) if len(tokens) > self.length}

    def identity(self) -> str:
        """Hashes of encoder and tokenizer, which text embeddings depend on."""
        return f"{folder.weights_hash(self.path)} {folder.weights_hash(self.tokenizer_path)}"
