"""Tensors that are split over the processes (FSDP2's DTensors): this process's part, the whole, and back.

For plain tensors all of these are identities or plain copies, so that who calls them need not ask. Nothing but a whole
tensor goes into a file: so a checkpoint knows nothing of the processes that made it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def forward_only(net: torch.nn.Module) -> Any:
    """torch's inference mode; without gradients where the network is split, whose gathered weights train elsewhere."""
    return torch.no_grad() if isinstance(next(net.parameters()), DTensor) else torch.inference_mode()


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; a plain tensor itself."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """A split tensor joined, on every process; a plain tensor itself. Every process must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def wholes(values: Any) -> Any:
    """Tensors, or dictionaries and lists of them and of other things, with every split tensor joined.

    Every process must call it, for the same tensors in the same order. The joined ones come to the main process alone,
    on the CPU, one after the other: the others hold an empty tensor in their place, and no process holds on its device
    more than one of them.
    """
    if isinstance(values, DTensor):
        joined = whole(values).detach()
        return joined.cpu() if torch.distributed.get_rank() == 0 else torch.empty(0)
    if isinstance(values, dict):
        return {name: wholes(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(wholes(value) for value in values)
    return values


def split(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, split as `like` is; itself where `like` is plain."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def rejoined(parts: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of which this process has the parts, each split as the one of its name in `like` is.

    Every process must call it; the main one alone gets them, as with `wholes`. Parts of plain tensors are these.
    """

    def joined(part: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return part
        own = part.to(like.device)
        return wholes(
            DTensor.from_local(own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
        )

    return {name: joined(part, like[name]) for name, part in parts.items()}


@torch.no_grad()
def put(value: Tensor, place: Tensor) -> None:
    """Copy a whole tensor into a place that may be split."""
    local(place).copy_(local(split(value, place)))


@torch.no_grad()
def exchange(a: Tensor, b: Tensor) -> None:
    """Let two tensors, split alike, change places: plain ones by their memory, split ones by what is in it.

    FSDP2 gathers weights from memory of its own, which a split tensor only shows.
    """
    if not isinstance(a, DTensor):
        a.data, b.data = b.data, a.data
        return
    mine, other = local(a), local(b)
    kept = mine.clone()
    mine.copy_(other)
    other.copy_(kept)
