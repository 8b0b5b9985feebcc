"""A tiny ImageReward, as a formula that the environment of the official code and ours see alike.

Only numpy, PIL and torch are needed.
"""

import json
from pathlib import Path

import numpy as np
import torch
from support.openclip import WORDS

MED = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-12,
}
FULL_MED = {**MED, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
FULL_MED["max_position_embeddings"] = 512
VISION = {"embed_dim": 128, "depth": 2, "num_heads": 2, "patch_size": 32, "img_size": 224}
HEAD = (48, 1024, 128, 64, 16, 1)
CAPTIONS = ["a photo of the cat", "A RED dog, café!", "", "highly detailed art by night " * 20]
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def vocabulary() -> list[str]:
    """Marks, letters as a word's beginning and within one, signs, and words."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    known = [*letters, *(f"##{letter}" for letter in letters), *",.!?'-()&;<>/", "猫", *WORDS]
    return [*MARKS, *dict.fromkeys(known)]


def write_vocabulary(folder: Path) -> Path:
    """The vocabulary as a vocab.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    return folder


def med_config(sizes: dict = MED) -> dict:
    """The text model's configuration, as med_config.json holds it."""
    return {**sizes, "vocab_size": len(vocabulary()) + 2, "add_cross_attention": True}


def filled(shapes: dict[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    """Weights of these names and shapes. Norms' weights are about 1; matrices keep the size of what they multiply."""
    numbers = np.random.RandomState(seed)  # whose stream is fixed for ever
    state = {}
    for name, shape in sorted(shapes.items()):
        values = torch.from_numpy(numbers.standard_normal(tuple(shape)).astype(np.float32))
        norm = name.endswith("weight") and len(shape) == 1
        wide = shape[1:].numel() if len(shape) > 1 else 25
        state[name] = 1 + 0.1 * values if norm else values * (2 / wide) ** 0.5
    return state


def make_imagereward(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """A folder as the hub has it, with a vocabulary beside."""
    write_vocabulary(folder)
    (folder / "med_config.json").write_text(json.dumps(med_config()), encoding="utf-8")
    torch.save(state, folder / "ImageReward.pt")
    return folder
