"""The reference: the same network with its adapters off, a frozen copy, a copy that follows slowly, or none."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffpref.sharding import local, put
from diffpref.types import Backbone, Cond, Predict


def adapters_off(backbone: Backbone) -> Predict:
    """The network that LoRA adapters stand on: no second copy in memory, and equal to the policy at the start."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for module in backbone.net.modules() if isinstance(module, BaseTunerLayer)]

    def predict(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with torch.no_grad(), _switched_off(adapted):
            return backbone.predict(x_t, t, cond)

    return predict


@contextlib.contextmanager
def _switched_off(layers: list[Any]) -> Iterator[None]:
    """peft's own `disable_adapters` sets `requires_grad` too, which FSDP2 reads when it first gathers a weight."""
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def frozen_copy(backbone: Backbone, copied: Callable[[Any], Any] = copy.deepcopy) -> Predict:
    """A copy of the network as it stands now, that never trains.

    It keeps the policy's dtype and runs under the same autocast: a copy in half precision rounds otherwise, and the
    first loss would not be log 2. For the same reason its weights keep `requires_grad`, although no gradient is ever
    taken: torch chooses the kernel of a linear layer by it, as in the projections of SD2's and SDXL's attention.
    copied: how it is made; a network that will be split over processes is not copied whole.
    """
    frozen = copied(backbone.net).eval()
    reference = backbone.with_net(frozen)

    def predict(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with torch.no_grad():
            return reference.predict(x_t, t, cond)

    return predict


class MovingReference:
    """A copy of the network that follows the policy as an average: reference = d reference + (1 - d) policy.

    This is the moving reference of Linear-DPO (arXiv 2605.21123; `--use_ema_ref` and `ModelEMA` of its published code,
    which has no warm-up of the decay either). It starts as a frozen copy and takes no part in the gradient.
    copied: as in `frozen_copy`.
    """

    def __init__(self, backbone: Backbone, decay: float, copied: Callable[[Any], Any] = copy.deepcopy) -> None:
        self._net = copied(backbone.net).eval()
        self._reference = backbone.with_net(self._net)
        self._decay = decay

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with torch.no_grad():
            return self._reference.predict(x_t, t, cond)

    @torch.no_grad()
    def follow(self, net: torch.nn.Module) -> None:
        """Move towards the policy's weights after an optimizer step. net: unwrapped."""
        for name, value in _trained(net).items():
            local(self._net.get_parameter(name)).lerp_(local(value), 1 - self._decay)

    def state(self) -> dict[str, Tensor]:
        """What of the copy has moved, by name."""
        return {name: value.detach() for name, value in _trained(self._net).items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take `state` back. Raises KeyError for the weights of another network."""
        trained = _trained(self._net)
        if set(state) != set(trained):
            raise KeyError("the checkpoint's reference is of other parameters than the model trains")
        for name, value in trained.items():
            put(state[name], value)


def _trained(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.named_parameters() if value.requires_grad}
