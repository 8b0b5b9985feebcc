"""The exponential moving average of what trains (Polyak and Juditsky, 1992; diffusers' EMAModel)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from diffpref.train.optimizers import trained_parameters


def decay_at(step: int, limit: float) -> float:
    """What is left of the average at optimizer step `step`, counted from 1: 0, then step / (9 + step) up to the limit.

    This is diffusers' EMAModel without `use_ema_warmup`, as Diffusion-DRO uses it: (1 + n) / (10 + n) where n is
    step - 1.
    """
    return 0.0 if step <= 1 else min(limit, step / (9 + step))


class EMA:
    """fp32 averages of a network's trainable parameters, by name. The network is to be passed unwrapped.

    They are where the parameters are, so that a GPU goes on while it averages; or, if offloaded, on the CPU, for which
    the host waits at every update.
    """

    def __init__(self, net: torch.nn.Module, decay: float, offload: bool = False) -> None:
        self._decay = decay
        with torch.no_grad():
            self._average = {
                name: value.detach().to("cpu" if offload else value.device, torch.float32, copy=True)
                for name, value in trained_parameters(net).items()
            }

    @torch.no_grad()
    def update(self, net: torch.nn.Module, step: int) -> None:
        """Take in the parameters after optimizer step `step`, counted from 1."""
        share, trained = 1 - decay_at(step, self._decay), trained_parameters(net)
        values = [value.detach().to(self._average[name]) for name, value in trained.items()]
        torch._foreach_lerp_([self._average[name] for name in trained], values, share)  # few kernels for all of them

    @contextlib.contextmanager
    def applied(self, net: torch.nn.Module) -> Iterator[None]:
        """While it lasts, the network's parameters are their averages; afterwards they are bit for bit as before."""
        parameters = trained_parameters(net)
        kept = {name: _copied(value) for name, value in parameters.items()}
        try:
            _put(self._average, parameters)
            yield
        finally:
            _put(kept, parameters)

    def state(self) -> dict[str, Tensor]:
        """The averages themselves, not copies."""
        return dict(self._average)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take `state` back. Raises KeyError for the averages of another network."""
        if set(state) != set(self._average):
            raise KeyError("the averages are of other parameters than the model trains")
        _put(state, self._average)


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


@torch.no_grad()
def _put(values: dict[str, Tensor], places: dict[str, Tensor]) -> None:
    for name, place in places.items():
        place.copy_(values[name])
