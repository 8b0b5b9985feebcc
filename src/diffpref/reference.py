"""The frozen reference: the same network with its adapters off, or a frozen copy, or none."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from diffpref.types import Backbone, Points

Reference = Callable[[Points], Tensor]


def adapters_off(backbone: Backbone) -> Reference:
    """The network that LoRA adapters stand on: no second copy in memory, and equal to the policy at the start."""

    def predict(points: Points) -> Tensor:
        backbone.net.disable_adapters()
        try:
            with torch.no_grad():
                return backbone.predict(points.x_t, points.t, points.cond)
        finally:
            backbone.net.enable_adapters()

    return predict


def frozen_copy(backbone: Backbone) -> Reference:
    """A copy of the network as it stands now, that never trains.

    It keeps the policy's dtype and runs under the same autocast: a copy in half precision rounds otherwise, and the
    first loss would not be log 2.
    """
    frozen = copy.deepcopy(backbone.net).requires_grad_(False).eval()
    reference = backbone.with_net(frozen)

    def predict(points: Points) -> Tensor:
        with torch.no_grad():
            return reference.predict(points.x_t, points.t, points.cond)

    return predict
