"""What operations allocate and compute, added up: each storage from its first appearance to its end, and FLOPs.

torch's `FlopCounterMode` is not used for the latter, only its formulas: it hangs hooks on every module, which keep
tensors longer than a real step does.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BLOCK = 512  # bytes; torch's allocator of GPU memory gives multiples of it


def _shaped(formula: Any) -> Any:
    """A formula of shapes as one of tensors, as the registry has them."""

    def of_tensors(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*(value.shape if isinstance(value, Tensor) else value for value in args))

    return of_tensors


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """2 x multiply-adds of attention's two products, of tensors of shape (rows, heads, tokens, width)."""
    return 2 * query[0] * query[1] * query[-2] * key[-2] * (query[-1] + value[-1])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Twice the forward's. A fused kernel computes the forward's products once more, which is no work of the model."""
    return 2 * _attention(query, key, value)


_ATEN: Any = torch.ops.aten
FORMULAS: dict[Any, Any] = flop_registry | {
    _ATEN._scaled_dot_product_efficient_attention_backward: _shaped(_attention_backward),
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _shaped(_attention),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _shaped(_attention_backward),
}


class Ledger(TorchDispatchMode):
    """While it is active, `live` is the bytes of the meta storages that operations made and that are still there.

    peak: its maximum so far. flops: 2 x multiply-adds of products of matrices and convolutions. Storages from before
    count nothing: what is known (`know`), and what an operation is given but no operation made.
    """

    def __init__(self, block: int = BLOCK) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._block = block
        self._seen: dict[int, Any] = {}

    def know(self, tensors: Any) -> None:
        """Leave these tensors out of the count, for they are counted elsewhere."""
        for tensor in tensors:
            self._note(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket not in FORMULAS:
            with self:  # in inference mode, products come as parts of larger operations
                if (made := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                    return made
        found = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=found)
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and value.is_meta:
                self._note(value, counted=True)
        return found

    def _note(self, tensor: Tensor, counted: bool) -> None:
        storage: Any = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // self._block) * self._block if counted else 0
        self._seen[key] = weakref.finalize(storage, self._end, key, size)
        self._seen[key].atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)

    def _end(self, key: int, size: int) -> None:
        self.live -= size
        self._seen.pop(key, None)


def bytes_of(tensors: Any) -> int:
    """The bytes of distinct storages behind tensors."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def held(module: torch.nn.Module) -> list[Tensor]:
    """A module's parameters and buffers."""
    return [*module.parameters(), *module.buffers()]
