"""Tensors on their way to the device, so that nobody waits.

A plain copy from the host's memory to a GPU's waits for all that the GPU has been given before. From pinned memory it
takes its turn among these, and the host goes on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The same values on a device, without waiting for what it is at."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def on_device(values: list[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers or truth values of the host on a device, without waiting for what it is at."""
    return to_device(torch.tensor(values, dtype=dtype), device)
