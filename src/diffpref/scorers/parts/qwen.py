"""Qwen2-VL under HPSv3's head: its images, its text, its network from the published names."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffpref import hub
from diffpref.errors import UserError, first_line
from diffpref.scorers.parts import weights
from diffpref.scorers.parts.pixels import normal, rgb, tensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import Qwen2VLConfig, Qwen2VLModel

QWEN2_VL_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584},
}
PATCH, MERGED, FRAMES = 14, 2, 2  # pixels of a patch, patches that become one token, repetitions of a still image
SIDE = PATCH * MERGED
IMAGE, END = "<|image_pad|>", "<|endoftext|>"
MARKS = (IMAGE, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", END)
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{images}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class QwenPixels:
    """Qwen2-VL's own at a fixed area: PIL's bicubic to sides that are multiples of 28 and keep the shape about."""

    pixels: int

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, height, width) fp32, normalised as CLIP's."""
        image = rgb(image)
        return normal(tensor(image.resize(self.sides(*image.size), Image.Resampling.BICUBIC)))

    def sides(self, width: int, height: int) -> tuple[int, int]:
        """Width and height: the nearest multiples, shrunk or grown where their area is not the wanted one."""
        near = [max(SIDE, round(side / SIDE) * SIDE) for side in (width, height)]
        factor = math.sqrt(self.pixels / (width * height))
        if math.prod(near) > self.pixels:
            near = [max(SIDE, math.floor(side * factor / SIDE) * SIDE) for side in (width, height)]
        elif math.prod(near) < self.pixels:
            near = [math.ceil(side * factor / SIDE) * SIDE for side in (width, height)]
        return near[0], near[1]

    def __str__(self) -> str:
        return f"RGB, PIL bicubic to about {self.pixels} pixels, sides multiples of {SIDE}, CLIP mean and deviation"


def patches(pixels: Tensor) -> Tensor:
    """A prepared image (3, height, width) as rows of patches, those of one token together: (patches, 1176)."""
    high, wide = (side // SIDE for side in pixels.shape[1:])
    parts = pixels.reshape(3, high, MERGED, PATCH, wide, MERGED, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
    return parts[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, FRAMES, -1, -1).reshape(-1, 3 * FRAMES * PATCH**2)


@dataclass(frozen=True, eq=False)
class Chat:
    """Qwen2-VL's tokenizer with a mark of the user's own, and the text that asks about one image.

    asked: the text, in which {text_prompt} stands for the caption and which has the mark once.
    """

    tokenizer: Any
    mark: str
    asked: str

    def __call__(self, prompts: Sequence[str], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens and mask (n, longest) int64, filled up on the right. counts: how many tokens each image has."""
        texts = [
            CHAT.format(images=IMAGE * count, text=self.asked.replace("{text_prompt}", self._harmless(prompt)))
            for prompt, count in zip(prompts, counts, strict=True)
        ]
        found = self.tokenizer(texts, padding=True, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    def number(self, mark: str) -> int:
        """The token of a mark."""
        return self.tokenizer.convert_tokens_to_ids(mark)

    def _harmless(self, prompt: str) -> str:
        """A caption without marks, which would pass for an image or for the place of the score."""
        for mark in sorted({str(each) for each in self.tokenizer.added_tokens_decoder.values()}, key=len, reverse=True):
            prompt = prompt.replace(mark, " ")
        return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def __str__(self) -> str:
        words = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        asked = hashlib.sha256((CHAT + self.asked).encode()).hexdigest()[:12]
        return f"Qwen2-VL byte pairs {hashlib.sha256(words.encode()).hexdigest()[:12]}, instruction {asked}"


def load_chat(place: str, scorer: str, mark: str, asked: str) -> Chat:
    """The tokenizer of a folder or a hub id, with the mark. Raises UserError where it is none of Qwen2-VL's."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = hub.ask(place, lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False))
    except Exception as error:  # each kind of damage raises its own
        line = f"{scorer}: {place} has no tokenizer that can be read: {hub.explained(error)}"
        raise hub.refusal(line, error) from error
    if missing := [each for each in MARKS if each not in tokenizer.get_vocab()]:
        raise UserError(f"{scorer}: {place} has no tokenizer of Qwen2-VL: it has no {missing[0]}")
    tokenizer.add_tokens([mark], special_tokens=True)
    tokenizer.padding_side, tokenizer.pad_token = "right", END
    return Chat(tokenizer, mark, asked)


def parted(state: Mapping[str, Tensor], head: str, what: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the network in transformers' names, and those of the head, whose names begin with `head`.

    Of the language model's names the older ones, which are published, and the newer ones are known. what: the file and
    what it should be. Raises UserError with the first key that is of no part.
    """
    network, own = {}, {}
    for name, value in state.items():
        if name.startswith(head):
            own[name.removeprefix(head)] = value
        elif name.startswith(("visual.", "model.visual.", "model.language_model.")):
            network[name.removeprefix("model.")] = value
        elif name.startswith("model."):
            network[f"language_{name}"] = value
        elif not name.startswith("lm_head."):
            raise UserError(f"{what}: the key {name} is of no part of it")
    if not own or not network:
        raise UserError(f"{what}: it has no keys {'model.' if own else head}*")
    return network, own


def read_config(file: Path, scorer: str) -> dict[str, Any]:
    """The published sizes, or those of a config.json of a Qwen2-VL beside the weights. Raises UserError."""
    beside = file.parent / "config.json"
    try:
        content = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        return content if content.get("model_type") == "qwen2_vl" else QWEN2_VL_7B
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{scorer}: {beside} is no configuration: {first_line(error)}") from error


def build_network(
    state: Mapping[str, Tensor], sizes: Mapping[str, Any], chat: Chat, what: str, dtype: torch.dtype, device: str
) -> Qwen2VLModel:
    """The network. Its rotary frequencies are rounded to bf16, as they were when HPSv3 was trained and published.

    The rounding moves far positions by whole radians, so it is part of the model whatever the precision now.
    """
    from transformers import Qwen2VLModel

    embedded = state.get("language_model.embed_tokens.weight")
    if embedded is None:
        raise UserError(f"{what}: model.embed_tokens.weight is missing")
    if len(embedded) <= chat.number(chat.mark):
        raise UserError(f"{what}: it has {len(embedded)} words, and the tokenizer {chat.number(chat.mark) + 1}")
    config = _config({**sizes, "vocab_size": len(embedded), "image_token_id": chat.number(IMAGE)}, what)
    network = weights.build(lambda: Qwen2VLModel(config), state, what, dtype, device)
    for name, buffer in network.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.bfloat16())
    return network


def _config(content: dict[str, Any], what: str) -> Qwen2VLConfig:
    from transformers import Qwen2VLConfig

    try:
        return Qwen2VLConfig(**content)
    except Exception as error:  # transformers raises many kinds for values
        raise UserError(f"{what}: its config.json is none of a Qwen2-VL: {first_line(error)}") from error
