"""The reference: the same network with its adapters off, a frozen copy, a copy that follows slowly, or none.

All run under torch's inference mode, which spares the host what autograd would note of each tensor. Such predictions
cannot be saved for a backward pass: an objective may subtract them, and multiply the difference, but not multiply the
policy by them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from diffpref.types import Backbone, Cond, Predict


def _as_it_is(net: torch.nn.Module) -> None:
    """Nothing is done to a copy."""


def adapters_off(backbone: Backbone) -> Predict:
    """The network that LoRA adapters stand on: no second copy in memory, and equal to the policy at the start.

    The layers with adapters are looked up once. peft's own switch goes through all modules each time, and turns the
    gradients of the adapters off and on, which takes 15 times as long and changes nothing here.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for module in backbone.net.modules() if isinstance(module, BaseTunerLayer)]

    def switch(off: bool) -> None:
        for layer in adapted:
            layer._disable_adapters = off

    def predict(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        switch(off=True)
        try:
            with torch.inference_mode():
                return backbone.predict(x_t, t, cond)
        finally:
            switch(off=False)

    return predict


def frozen_copy(backbone: Backbone, prepare: Callable[[torch.nn.Module], None] = _as_it_is) -> Predict:
    """A copy of the network as it stands now, that never trains.

    It keeps the policy's dtype and runs under the same autocast: a copy in half precision rounds otherwise, and the
    first loss would not be log 2. For the same reason its weights keep `requires_grad`, although no gradient is ever
    taken: torch chooses the kernel of a linear layer by it, as in the projections of SD2's and SDXL's attention.
    prepare: what is to be done to the copy, such as compiling it, which copying undoes.
    """
    frozen = copy.deepcopy(backbone.net).eval()
    prepare(frozen)
    reference = backbone.with_net(frozen)

    def predict(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with torch.inference_mode():
            return reference.predict(x_t, t, cond)

    return predict


class MovingReference:
    """A copy of the network that follows the policy as an average: reference = d reference + (1 - d) policy.

    This is the moving reference of Linear-DPO (arXiv 2605.21123; `--use_ema_ref` and `ModelEMA` of its published code,
    which has no warm-up of the decay either). It starts as a frozen copy and takes no part in the gradient.
    """

    def __init__(
        self, backbone: Backbone, decay: float, prepare: Callable[[torch.nn.Module], None] = _as_it_is
    ) -> None:
        self._net = copy.deepcopy(backbone.net).eval()
        prepare(self._net)
        self._reference = backbone.with_net(self._net)
        self._decay = decay

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with torch.inference_mode():
            return self._reference.predict(x_t, t, cond)

    @torch.no_grad()
    def follow(self, net: torch.nn.Module) -> None:
        """Move towards the policy's weights after an optimizer step. net: unwrapped."""
        moving = _trained(self._net)
        pairs = [(moving[name], value.detach()) for name, value in _trained(net).items()]
        torch._foreach_lerp_([own for own, _ in pairs], [value for _, value in pairs], 1 - self._decay)

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
            value.copy_(state[name])


def _trained(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.named_parameters() if value.requires_grad}
