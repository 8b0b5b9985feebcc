"""HPSv3 (Ma et al. 2025, arXiv 2508.03789): Qwen2-VL-7B with a head of three layers; about 0 to 15.

The model reads the image, a fixed instruction and the caption, and the head reads the state at the instruction's mark.
It gives a mean and a deviation; the mean is the score. Two things are the published model's own and no other
Qwen2-VL's: every token's position is its place in the row, on all three axes, where transformers would give an image's
tokens a grid; and rotary frequencies are bf16's. The published weights are bf16, so that is the precision unless
another is asked for: 16 GB, twice that in fp32.

Marks within a caption, which the published code takes for an image or for the place of the score, are left out here.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpref.errors import UserError, first_line
from diffpref.scorers.base import Precision, Reward, Scorer
from diffpref.scorers.parts import qwen
from diffpref.scorers.parts import weights as files

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("diffpref")
NAME = "hpsv3"
HOME = "MizzenAI/HPSv3"
FILES = ("HPSv3.safetensors", *files.MODEL_FILES)
TOKENIZER = "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * qwen.SIDE**2
MARK = "<|Reward|>"
INSTRUCTION = "instruction.txt"
PUBLISHED = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"  # its SHA-256
HEAD, LAYERS = "rm_head.", ("0", "3", "5")


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "bf16") -> Scorer:
    """weights: `WEIGHTS[=TOKENIZER]`; a config.json beside the weights tells other sizes than the published ones.

    The instruction is the text of its authors' package and no part of ours: it is read from `instruction.txt` beside
    the tokenizer or the weights. Raises UserError where there is none, and for weights that cannot be read or are not
    of this kind.
    """
    import torch

    place, _, words = (weights or "").partition("=")
    dtype = files.dtype_of(precision, device)
    file = files.find(place or HOME, FILES, NAME)
    words = words or _words(place)
    chat = qwen.load_chat(words, NAME, MARK, _instruction(words, file))
    what = f"{NAME}: {file} is no HPSv3"
    state, head_state = qwen.parted(files.read(file, NAME), HEAD, what)
    network = qwen.build_network(state, qwen.read_config(file, NAME), chat, what, dtype, device)
    text: Any = network.config.text_config
    head = _head(head_state, text.hidden_size, what, device)
    reward = chat.number(MARK)

    def measure(prepared: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        grids = torch.tensor([[1, each.shape[1] // qwen.PATCH, each.shape[2] // qwen.PATCH] for each in prepared])
        counts = (grids.prod(dim=1) // qwen.MERGED**2).tolist()
        ids, mask = (each.to(device) for each in chat(prompts, counts))
        with torch.inference_mode():
            states = network(
                input_ids=ids,
                attention_mask=mask,
                position_ids=torch.arange(ids.shape[1], device=device).expand(3, *ids.shape),
                pixel_values=torch.cat([qwen.patches(each) for each in prepared]).to(device, dtype),
                image_grid_thw=grids.to(device),
                use_cache=False,
            ).last_hidden_state
            return head(states[ids == reward].float())[:, 0]

    total = files.digest(file)
    prepare = qwen.QwenPixels(PIXELS)
    identity = {
        "weights": files.label(file, total, {}, NAME),
        "sha256": total,
        "architecture": f"Qwen2-VL {text.hidden_size}x{text.num_hidden_layers}/{text.num_attention_heads}",
        "precision": precision,
        "preprocessing": str(prepare),
        "text": str(chat),
        "formula": f"mean of the head, in fp32, at {MARK}, places as positions; 1",
    }
    return Reward(NAME, identity, prepare, measure)


def _instruction(words: str, weights: Path) -> str:
    """The text that the model was trained with; a warning where it is another than the published one."""
    found = [folder / INSTRUCTION for folder in (Path(words), weights.parent) if (folder / INSTRUCTION).is_file()]
    if not found:
        raise UserError(
            f"{NAME}: no {INSTRUCTION} in {words} or {weights.parent}: save INSTRUCTION + prompt_with_special_token of "
            f"hpsv3/dataset/data_collator_qwen.py (package hpsv3 1.0.0) under that name beside the tokenizer"
        )
    try:
        content = found[0].read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{NAME}: cannot read {found[0]}: {first_line(error)}") from error
    if text.count(MARK) != 1 or text.count("{text_prompt}") != 1:
        raise UserError(f"{NAME}: {found[0]} must hold {{text_prompt}} and {MARK} once each")
    if hashlib.sha256(content).hexdigest() != PUBLISHED:
        log.warning("%s: %s is not the published instruction, so scores are not those of HPSv3", NAME, found[0])
    return text


def _words(place: str) -> str:
    """Where the tokenizer is: in or beside weights that were given if it is there, else published."""
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    there = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return str(folder) if place and Path(place).exists() and there else TOKENIZER


@dataclass(frozen=True)
class _Head:
    """Linear layers with ReLU between."""

    layers: Sequence[tuple[Tensor, Tensor]]

    def __call__(self, states: Tensor) -> Tensor:
        """(n, 2) of states (n, width)."""
        from torch.nn.functional import linear

        for place, (weight, bias) in enumerate(self.layers):
            states = linear(states.relu() if place else states, weight, bias)
        return states


def _head(state: Mapping[str, Tensor], width: int, what: str, device: str) -> _Head:
    layers = []
    for layer in LAYERS:
        weight, bias = state.get(f"{layer}.weight"), state.get(f"{layer}.bias")
        if weight is None or bias is None:
            raise UserError(f"{what}: {HEAD}{layer}.{'bias' if weight is not None else 'weight'} is missing")
        if weight.shape != (len(bias), width):
            raise UserError(
                f"{what}: {HEAD}{layer}.weight has the shape {tuple(weight.shape)}, where {(len(bias), width)} is "
                "expected"
            )
        layers.append((weight.float().to(device), bias.float().to(device)))
        width = len(bias)
    if width != 2:
        raise UserError(f"{what}: its head gives {width} numbers, where a mean and a deviation are expected")
    return _Head(layers)
