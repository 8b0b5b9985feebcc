"""Weights in open_clip's naming, as HPSv2 and LAION publish them, in the naming of transformers' CLIPModel."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TOWERS = {  # the longest first, for `transformer` is an end of `visual.transformer`
    r"visual\.transformer\.resblocks": "vision_model.encoder.layers",
    r"transformer\.resblocks": "text_model.encoder.layers",
}
IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def is_open_clip(state: Mapping[str, Tensor]) -> bool:
    """Whether weights are named as open_clip names them."""
    return any(name.startswith(("visual.", "transformer.resblocks.")) for name in state)


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in transformers' names; a name that open_clip does not have stays as it is.

    The fused projection of attention, queries above keys above values, becomes three; the two projections to the shared
    space, which open_clip multiplies from the right, are turned.
    """
    return {new: tensor for name, value in state.items() for new, tensor in _renamed(name, value)}


def _renamed(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name in TRANSPOSED:
        yield TRANSPOSED[name], value.T.contiguous()
        return
    for tower, place in TOWERS.items():
        if found := re.fullmatch(rf"{tower}\.(\d+)\.(.+)", name):
            yield from _of_block(f"{place}.{found[1]}", found[2], name, value)
            return
    yield OUTSIDE.get(name, name), value


def _of_block(block: str, rest: str, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    part, _, kind = rest.rpartition(".")
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.removeprefix("attn.in_proj_")
        for letter, third in zip("qkv", value.chunk(3), strict=True):
            yield f"{block}.self_attn.{letter}_proj.{kind}", third
    elif part in IN_BLOCK:
        yield f"{block}.{IN_BLOCK[part]}.{kind}", value
    else:
        yield name, value
