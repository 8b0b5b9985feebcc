"""ImageReward's network as transformers' BLIP has it, from the published weights' own names.

Three of transformers' defaults are not ImageReward's and would load in silence: 8 heads of the text model (12 here), a
width of 768 of what it attends to (the vision model's here), and 1e-5 in the vision model's norms (1e-6 here). The text
model is a decoder by its configuration, for that gives it cross-attention, and runs as an encoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpref.errors import UserError, first_line
from diffpref.scorers.parts import weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import BlipTextModel, BlipVisionModel

VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # of BLIP's pretraining
HEAD_WIDTH = 64  # of one head of the vision model, in ViT-L/16 as in every published ViT; weights do not tell it
EPS = 1e-6  # of the vision model's norms
MED = {  # the published med_config.json, as far as it is read
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "vocab_size": 30524,
    "layer_norm_eps": 1e-12,
}
IN_VISION = {
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed": "embeddings.position_embedding",
    r"patch_embed\.proj": "embeddings.patch_embedding",
    r"blocks\.(\d+)\.norm([12])": r"encoder.layers.\1.layer_norm\2",
    r"blocks\.(\d+)\.attn\.qkv": r"encoder.layers.\1.self_attn.qkv",
    r"blocks\.(\d+)\.attn\.proj": r"encoder.layers.\1.self_attn.projection",
    r"blocks\.(\d+)\.mlp": r"encoder.layers.\1.mlp",
    r"norm": "post_layernorm",
}


def read_med(file: Path | None, scorer: str) -> dict[str, Any]:
    """The text model's sizes: the published ones, but for what a med_config.json tells. Raises UserError."""
    if file is None:
        return MED
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {name: type(value)(content.get(name, value)) for name, value in MED.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{scorer}: {file} cannot be read as a med_config.json: {first_line(error)}") from error


def parted(state: Mapping[str, Tensor], what: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the vision model and of the text model in transformers' names, and those of the head.

    what: the file and what it should be, for the message. Raises UserError with the first key that is of none of them,
    and where one of them has none.
    """
    vision, text, head = {}, {}, {}
    for name, value in state.items():
        if name.startswith(VISION):
            vision[_in_vision(name.removeprefix(VISION))] = value
        elif name.startswith(TEXT):
            text[name.removeprefix(TEXT)] = value
        elif name.startswith(HEAD):
            head[name.removeprefix(HEAD)] = value
        elif not name.startswith(UNUSED):
            raise UserError(f"{what}: the key {name} is of no part of it")
    for prefix, found in ((VISION, vision), (TEXT, text), (HEAD, head)):
        if not found:
            raise UserError(f"{what}: it has no keys {prefix}*")
    return vision, text, head


def _in_vision(name: str) -> str:
    part, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
    for old, new in IN_VISION.items():
        if found := re.match(rf"{old}(?=\.|$)", part):
            rest = part[found.end() :]
            return ".".join(filter(None, [found.expand(new) + rest, kind]))
    return name


def build_vision(state: Mapping[str, Tensor], what: str, dtype: torch.dtype, device: str) -> BlipVisionModel:
    """The vision model, whose sizes its weights tell. Raises UserError with the first key that differs."""
    from transformers import BlipVisionConfig, BlipVisionModel

    patches, positions = state.get("embeddings.patch_embedding.weight"), state.get("embeddings.position_embedding")
    fused = state.get("encoder.layers.0.mlp.fc1.weight")
    if patches is None or positions is None or fused is None or patches.ndim != 4 or positions.ndim != 3:
        raise UserError(f"{what}: patch_embed.proj.weight, pos_embed or blocks.0.mlp.fc1.weight is missing or no ViT's")
    patch, side = patches.shape[-1], round((positions.shape[1] - 1) ** 0.5)
    layers = {found[1] for name in state if (found := re.match(r"encoder\.layers\.(\d+)\.", name))}
    config = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=fused.shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, patches.shape[0] // HEAD_WIDTH),
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=EPS,
    )
    return weights.build(lambda: BlipVisionModel(config), state, what, dtype, device)


def side(vision: Any) -> int:
    """The side in pixels of a vision model's images."""
    return vision.config.image_size


def build_text(
    state: Mapping[str, Tensor], med: Mapping[str, Any], width: int, what: str, dtype: torch.dtype, device: str
) -> BlipTextModel:
    """The text model, which attends to features of a width. Raises UserError with the first key that differs."""
    from transformers import BlipTextConfig, BlipTextModel

    config = BlipTextConfig(**med, encoder_hidden_size=width, is_decoder=True)
    return weights.build(lambda: BlipTextModel(config, add_pooling_layer=False), state, what, dtype, device)
