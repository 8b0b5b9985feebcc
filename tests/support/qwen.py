"""A tiny Qwen2-VL with HPSv3's head, as random numbers from a fixed stream that both sides of a comparison see.

Only numpy, PIL and torch are needed.
"""

import json
import re
from pathlib import Path

import torch
from support.blip import filled
from support.openclip import PRINTABLE, SYMBOLS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
MARK = "<|Reward|>"
SEED = 9
WORDS = """ image overall quality visual evaluate prompt textual human score rating alignment should relevance
 consistency elements style attribute detail system helpful assistant user subject the and any such with match
 description"""
INSTRUCTION = f"""
How well does the image match its prompt, and how good is its style?

Prompt - {{text_prompt}}
Rating {MARK}, quality."""  # of our own: any will do to compare two implementations
CAPTIONS = ["a photo of the cat", "A RED dog & <b>blue</b> {sky}, 猫!", ""]
SIZES = [(224, 224), (300, 500), (640, 100)]


def merges() -> list[tuple[str, str]]:
    """Byte pairs that make a token of each word after a space, and of a new line twice."""
    space = SYMBOLS[len(PRINTABLE) + 32]
    found: dict[tuple[str, str], None] = {}
    for word in re.findall(r"\w+", WORDS):
        left = space
        for letter in word:
            found[left, letter] = None
            left += letter
    return list(found)


def symbols() -> list[str]:
    """The vocabulary in its order, but for the special tokens at its end."""
    return list(dict.fromkeys([*SYMBOLS, *("".join(pair) for pair in merges())]))


def write_tokenizer(folder: Path) -> Path:
    """The tokenizer in the files that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    known = symbols()
    (folder / "vocab.json").write_text(json.dumps({each: place for place, each in enumerate(known)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges())]) + "\n")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(len(known) + place): {"content": each, **flags} for place, each in enumerate(SPECIAL)}
    told = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": SPECIAL[0], "eos_token": "<|im_end|>", "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, "added_tokens_decoder": added}))
    return folder


def config() -> dict:
    """A config.json of the tiny network."""
    count = len(symbols())
    return {
        "model_type": "qwen2_vl",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": count + len(SPECIAL) + 1,
        "image_token_id": count + SPECIAL.index("<|image_pad|>"),
        "video_token_id": count + SPECIAL.index("<|video_pad|>"),
        "vision_start_token_id": count + SPECIAL.index("<|vision_start|>"),
        "vision_end_token_id": count + SPECIAL.index("<|vision_end|>"),
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
        "tie_word_embeddings": False,
    }


def state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The weights of these names and shapes."""
    return filled({name: torch.Size(shape) for name, shape in shapes.items()}, SEED)
