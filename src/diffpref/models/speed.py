"""What makes any family's network faster or smaller in training, and changes nothing but the last bits of its results.

Compiled are single blocks, in place: the many blocks of a kind share what is compiled, and neither names nor weights
change. Which blocks, diffusers says of its transformers; of its U-Nets it names the attention alone, so that residual
blocks are added here.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

BACKEND = "inductor"
RECOMPILATIONS = 128  # a U-Net's blocks have some twenty shapes, each with gradients, without, and under guidance
CONVOLUTIONS = ("ResnetBlock2D",)


def compile_blocks(net: Any) -> None:
    """Compile the network's repeated blocks, for the shapes that they meet. A copy of the network is not compiled."""
    names = {*(getattr(net, "_repeated_blocks", None) or net._no_split_modules or ()), *CONVOLUTIONS}
    for module in net.modules():
        if type(module).__name__ in names:
            module.compile(backend=BACKEND, dynamic=False, recompile_limit=RECOMPILATIONS)


def channels_last(net: Any, wanted: bool | None, device: torch.device) -> None:
    """Keep the channels of a U-Net's convolutions last in memory, as a GPU's kernels want; `wanted` None: on a GPU.

    A transformer has no convolutions that would matter.
    """
    if (device.type == "cuda" if wanted is None else wanted) and _is_unet(net):
        net.to(memory_format=torch.channels_last)


def checkpoint_activations(net: Any, mode: bool | Literal["selective"]) -> None:
    """Let blocks compute their activations again in the backward pass: all of them, or the selected ones.

    Selected are those that save most memory for their time: in a U-Net all of the highest resolution, whose
    activations are the largest and whose channels the fewest; in a transformer, whose blocks are alike, every second.
    """
    if not mode:
        return
    selected = set(net.modules()) if mode is True else _selected(net)

    def run(block: Any, *given: Any) -> Any:
        return checkpoint(block, *given, use_reentrant=False) if block in selected else block(*given)

    net.enable_gradient_checkpointing(run)


def _selected(net: Any) -> set[Any]:
    if _is_unet(net):
        return {*net.down_blocks[0].modules(), *net.up_blocks[-1].modules()}
    names = getattr(net, "_repeated_blocks", None) or net._no_split_modules
    return set([module for module in net.modules() if type(module).__name__ in names][::2])


def _is_unet(net: Any) -> bool:
    return hasattr(net, "down_blocks")
