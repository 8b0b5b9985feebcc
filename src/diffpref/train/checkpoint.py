"""Checkpoints: written beside, flushed, summed, renamed. A folder `step-N` is complete when its manifest.json is there.

Content: `weights.safetensors` (what trains), `optimizer.safetensors`, `state.json` (position and counters) and
`manifest.json` (SHA-256 of each). Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpref.files import flush, sha256

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on. optimizer: `<parameter number>.<state name>` -> tensor."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def capture(step: int, net: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a net's trainable weights and its optimizer after `step` steps."""
    weights = {name: value.detach().cpu().contiguous() for name, value in _trained(net).items()}
    slots = optimizer.state_dict()["state"]
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, entries in slots.items()
        for name, value in entries.items()
    }
    return Checkpoint(step, weights, tensors, state)


def restore(checkpoint: Checkpoint, net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state back in place. Raises KeyError for a net of other parameters."""
    trained = _trained(net)
    if set(trained) != set(checkpoint.weights):
        raise KeyError("the checkpoint holds other parameters than the model trains")
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(checkpoint.weights[name])
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in checkpoint.optimizer.items():
        number, name = key.split(".", 1)
        slots.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-N` and, once it is complete, remove the oldest beyond `keep` (0 keeps all)."""
    target = folder / f"step-{checkpoint.step}"
    part = folder / f".{target.name}-{uuid.uuid4().hex[:8]}.part"
    part.mkdir(parents=True)
    save_file(checkpoint.weights, part / "weights.safetensors")
    save_file(checkpoint.optimizer, part / "optimizer.safetensors")
    state = {**checkpoint.state, "step": checkpoint.step}
    (part / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    sums = {path.name: sha256(path) for path in sorted(part.iterdir())}
    (part / MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    for path in [*part.iterdir(), part]:
        flush(path)
    if target.exists():
        shutil.rmtree(target)
    part.rename(target)
    flush(folder)
    if keep:
        for _, old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
    for leftover in folder.glob(".step-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def newest(folder: Path) -> tuple[Checkpoint | None, list[Path]]:
    """The newest checkpoint whose files match their sums (None if there is none), and the damaged ones passed over."""
    damaged = []
    for step, path in reversed(_complete(folder)):
        if _intact(path):
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            weights, optimizer = load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors")
            return Checkpoint(step, weights, optimizer, state), damaged
        damaged.append(path)
    return None, damaged


def _trained(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.named_parameters() if value.requires_grad}


def _complete(folder: Path) -> list[tuple[int, Path]]:
    named = [path for path in folder.glob("step-*") if (path / MANIFEST).is_file()]
    return sorted((int(path.name.removeprefix("step-")), path) for path in named)


def _intact(path: Path) -> bool:
    try:
        sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        needed = {"weights.safetensors", "optimizer.safetensors", "state.json"}
        return needed <= set(sums) and all(sha256(path / name) == total for name, total in sums.items())
    except (OSError, ValueError, TypeError):
        return False
