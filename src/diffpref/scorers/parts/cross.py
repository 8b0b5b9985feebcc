"""MPS's cross model: layers in which an image's tokens attend to a caption's, then to one another.

Queries have several heads, keys and values one (multi-query attention, arXiv 1911.02150); the gates are SwiGLU's
(arXiv 2002.05202), the positions rotary (arXiv 2104.09864). The names are those of the published weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

HEAD_WIDTH = 64
GROWTH = 4  # of the layer within each feed-forward part
BASE = 10_000.0  # of the rotary frequencies

Tokens = Float[Tensor, "n tokens width"]
Words = Float[Tensor, "n words width"]
Bias = Float[Tensor, "n 1 words"]


class CrossAttention(nn.Module):
    """Image tokens attend to words; a feed-forward part runs beside, on the same normalised tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * HEAD_WIDTH, width, bias=False)
        inner = GROWTH * width
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * inner, bias=False), nn.Identity(), nn.Linear(inner, width, bias=False)
        )

    def forward(self, tokens: Tokens, words: Words, bias: Bias) -> Tokens:
        """What is added to the tokens. bias: 0 for words that are seen, -inf for the others."""
        normal = self.norm(tokens)
        keys, values = self.to_kv(words).chunk(2, dim=-1)
        seen = _attend(_heads(self.to_q(normal), self.heads), keys, values, bias)
        return self.to_out(seen) + self.ff[2](_gated(self.ff[0](normal)))


class SelfAttention(nn.Module):
    """Tokens attend to one another, with a feed-forward part beside; one matrix makes the inputs of both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.parts = (heads * HEAD_WIDTH, HEAD_WIDTH, HEAD_WIDTH, 2 * GROWTH * width)
        self.norm = nn.LayerNorm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * HEAD_WIDTH, width, bias=False)
        self.ff_out = nn.Sequential(nn.Identity(), nn.Linear(GROWTH * width, width, bias=False))

    def forward(self, tokens: Tokens) -> Tokens:
        """What is added to the tokens."""
        queries, keys, values, inner = self.fused_attn_ff_proj(self.norm(tokens)).split(self.parts, dim=-1)
        turned = _turn(_heads(queries, self.heads)), _turn(keys)
        return self.attn_out(_attend(*turned, values)) + self.ff_out[1](_gated(inner))


class CrossModel(nn.Module):
    """The layers, each with a cross-attention and a self-attention in turn."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList(
            nn.ModuleList([CrossAttention(width, heads), SelfAttention(width, heads)]) for _ in range(layers)
        )

    def forward(self, tokens: Tokens, words: Words, bias: Bias) -> Tokens:
        """The tokens of an image after all layers."""
        for layer in self.layers:
            cross, own = layer.children()
            tokens = tokens + cross(tokens, words, bias)
            tokens = tokens + own(tokens)
        return tokens


def _heads(queries: Tensor, heads: int) -> Tensor:
    """(n, tokens, heads x width) as (n, heads, tokens, width)."""
    return queries.unflatten(-1, (heads, HEAD_WIDTH)).transpose(1, 2)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, tokens, heads x width) of queries (n, heads, tokens, width) over one head of keys and values."""
    likeness = (queries * HEAD_WIDTH**-0.5) @ keys[:, None].transpose(-1, -2)
    if bias is not None:
        likeness = likeness + bias[:, None]
    return (likeness.softmax(dim=-1) @ values[:, None]).transpose(1, 2).flatten(2)


def _gated(inner: Tensor) -> Tensor:
    """SwiGLU: the first half times the sigmoid-weighted second half."""
    value, gate = inner.chunk(2, dim=-1)
    return silu(gate) * value


def _turn(tokens: Tensor) -> Tensor:
    """Rotary positions on (..., tokens, width): place p turns the i-th pair of halves by p / BASE^(2 i / width)."""
    count, width = tokens.shape[-2:]
    speeds = BASE ** (-torch.arange(0, width, 2, device=tokens.device, dtype=torch.float32) / width)
    angles = torch.arange(count, device=tokens.device, dtype=torch.float32)[:, None] * speeds
    cosine, sine = (each(angles).to(tokens.dtype) for each in (torch.cos, torch.sin))
    first, second = tokens.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
