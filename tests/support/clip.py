"""A tiny CLIP with its tokenizer as a folder on the disk, in transformers' format or in open_clip's naming."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.openclip import EMBED, LENGTH, TEXT, VISION, symbols, tiny_state, write_tokenizer

from diffpref.scorers.parts.openclip import from_open_clip


def config(act: str = "gelu") -> dict:
    """A config.json of the tiny CLIP."""
    vision = {key: VISION[key] for key in ("patch_size", "image_size")}
    return {
        "model_type": "clip",
        "projection_dim": EMBED,
        "vision_config": {**vision, **_tower(VISION["width"], 2), "hidden_act": act},
        "text_config": {
            **_tower(TEXT["width"], 2),
            "hidden_act": act,
            "vocab_size": len(symbols()) + 2,
            "max_position_embeddings": LENGTH,
            "eos_token_id": 2,  # as published configurations have it
        },
    }


def _tower(width: int, heads: int) -> dict:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2}
    return {**sizes, "num_attention_heads": heads}


def make_clip(
    folder: Path, act: str = "gelu", file: str = "model.safetensors", state: dict[str, torch.Tensor] | None = None
) -> Path:
    """Write the folder. A `.pt` holds open_clip's names in `state_dict`, another file transformers' names."""
    state = tiny_state() if state is None else state
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config(act)), encoding="utf-8")
    if file.endswith(".pt"):
        torch.save({"state_dict": state}, folder / file)
    else:
        save_file({name: value.contiguous().clone() for name, value in from_open_clip(state).items()}, folder / file)
    return folder
