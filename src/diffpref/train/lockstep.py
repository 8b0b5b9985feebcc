"""Split networks go forward in all processes at once, also where one process has more to compute than another.

A forward of a split network gathers its weights from all processes, so each of them must take part in it. Samplers need
more forwards in one process than in another, and the main process alone looks at a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

DONE = 0  # what a process says that needs no more forwards; else the number of its network, from 1


class Lockstep:
    """Before each forward within `together`, every process tells which network it is at.

    forward: one forward of a network that it is given, of any input.
    """

    def __init__(self, accelerator: Accelerator, nets: list[Any], forward: Callable[[Any], Tensor]) -> None:
        self._accelerator, self._nets, self._forward = accelerator, nets, forward
        self._within = False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Every process must enter it, with any number of forwards of its own in it. It ends in all of them at once.

        Forwards within run under the run's autocast, as the weights are gathered in its precision. Within another
        such context it does nothing: those whom it would wait for serve that one already.
        """
        if self._within:
            yield
            return
        self._within = True
        hooks = [hook for number, net in enumerate(self._nets, 1) for hook in self._hooks(net, number)]
        try:
            yield
        finally:
            self._within = False
            for hook in hooks:
                hook.remove()
        while (number := self._agree(DONE)) != DONE:
            with torch.no_grad(), self._accelerator.autocast():
                self._forward(self._nets[number - 1])

    def _hooks(self, net: Any, number: int) -> list[Any]:
        casts: list[contextlib.AbstractContextManager[None]] = []

        def before(*_: Any) -> None:
            self._agree(number)
            casts.append(self._accelerator.autocast())
            casts[-1].__enter__()

        def after(*_: Any) -> None:
            casts.pop().__exit__(None, None, None)

        # before FSDP2's own hook, which gathers
        return [net.register_forward_pre_hook(before, prepend=True), net.register_forward_hook(after, always_call=True)]

    def _agree(self, number: int) -> int:
        """The network that some process is at, after each of them has told its own."""
        told: Any = self._accelerator.gather(torch.tensor([number], device=self._accelerator.device))
        wanted = int(told.max())
        if number not in (DONE, wanted):
            raise ValueError(f"processes are at different networks: {told.tolist()}")
        return wanted
