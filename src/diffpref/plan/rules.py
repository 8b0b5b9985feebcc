"""Autocast's rules on the meta device, which torch's autocast does not know, and attention as a GPU computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Device = Literal["cuda", "cpu"]

# torch's documentation of amp, "Autocast Op Reference", as far as these networks call them.
LOWER = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    torch.addmm,
    torch.einsum,
}
FP32_ON_CUDA = {
    F.layer_norm,
    F.group_norm,
    F.softmax,
    torch.softmax,
    Tensor.softmax,
    F.softplus,
    torch.exp,
    Tensor.exp,
    torch.pow,
    Tensor.pow,
    Tensor.__pow__,
    torch.rsqrt,
    Tensor.rsqrt,
    torch.sum,
    Tensor.sum,
    torch.cumsum,
    Tensor.cumsum,
    F.mse_loss,
}


class Rules(TorchFunctionMode):
    """While it is active, functions on meta tensors have the dtypes and the saved tensors that they have on a device.

    dtype: what autocast casts to; fp32 for no autocast, which leaves all as it is. device: whose rules; a GPU computes
    norms and softmax in fp32, a CPU does not. Attention is a fused kernel on both: of the backward's tensors it keeps
    queries, keys, values, the output and a number a query.
    """

    def __init__(self, dtype: torch.dtype, device: Device) -> None:
        super().__init__()
        self._dtype, self._device, self._on, self._keep = dtype, device, False, True
        self._cast: dict[int, Tensor] = {}

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """A region of autocast: the casts of weights that train are made once in it, and live until its end."""
        self._on = self._dtype != torch.float32
        try:
            yield
        finally:
            self._on = False
            self._cast.clear()

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """The backward pass: checkpointed parts run again under autocast, each with casts of its own."""
        self._keep = False
        try:
            with self.autocast():
                yield
        finally:
            self._keep = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if self._on and func in LOWER:
            args, given = self._in(self._dtype, args), self._in(self._dtype, given)
        elif self._on and self._device == "cuda" and func in FP32_ON_CUDA:
            args, given = self._in(torch.float32, args), self._in(torch.float32, given)
        elif func is F.scaled_dot_product_attention:
            if self._on:
                args, given = self._in(self._dtype, args), self._in(self._dtype, given)
            return self._attention(*args, **given)
        return func(*args, **given)

    def _in(self, dtype: torch.dtype, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._to(dtype, value) if value.is_floating_point() and value.dtype != dtype else value
        if isinstance(value, dict):
            return {key: self._in(dtype, entry) for key, entry in value.items()}
        return type(value)(self._in(dtype, entry) for entry in value) if type(value) in (list, tuple) else value

    def _to(self, dtype: torch.dtype, value: Tensor) -> Tensor:
        """The value's cast; of a leaf that trains, the one that was made before, as autocast keeps it."""
        if not (self._keep and value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._cast:
            with torch.enable_grad():
                self._cast[id(value)] = value.to(dtype)
        return self._cast[id(value)]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        ops: Any = torch.ops.aten
        if self._device == "cpu":
            return ops._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        logsumexp = torch.is_grad_enabled()
        return ops._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, logsumexp, dropout_p, is_causal, scale=scale
        )[0]
