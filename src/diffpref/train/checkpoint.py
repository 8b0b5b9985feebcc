"""Checkpoints: written beside, flushed, summed, renamed. A folder `step-N` is complete when its manifest.json is there.

Content: `weights.safetensors` (what trains), `optimizer.safetensors` (its tensors, and in the header as JSON how they
and its numbers fit together), `ema`, `reference` and `points.safetensors` where a run has these, `state.json` (position
and counters) and `manifest.json` (SHA-256 of each). Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpref.errors import RunError
from diffpref.files import disk_full, flush, no_room, sha256
from diffpref.train.optimizers import trained_parameters

MANIFEST = "manifest.json"
NEEDED = {"weights.safetensors", "optimizer.safetensors", "state.json"}


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    optimizer: `<parameter number>.<state name>` -> tensor. layout: the optimizer's state and groups as JSON, in which
    {"tensor": NAME} stands for one of these tensors. extra: by the name of its file what else a run has: the averaged
    weights (`ema`), a moving `reference`, the replay buffer (`points`).
    Tensors that were captured from the CPU are the run's own, not copies.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    layout: dict[str, Any]
    state: dict[str, Any]
    extra: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The bytes of its tensors, which are all but some thousand of those of its files."""
        parts = (self.weights, self.optimizer, *self.extra.values())
        return sum(tensor.nbytes for part in parts for tensor in part.values())


def capture(
    step: int,
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    extra: dict[str, dict[str, Tensor]] | None = None,
) -> Checkpoint:
    """The checkpoint of a net's trainable weights and its optimizer after `step` steps; `state` goes into JSON.

    extra: as in Checkpoint; what is empty is left out.

    Raises TypeError for an optimizer that keeps something else than tensors, numbers, texts and lists of these.
    """
    weights = {name: _on_cpu(value) for name, value in trained_parameters(net).items()}
    held, tensors, names = optimizer.state_dict(), {}, {}
    slots = {str(number): _pack(entry, str(number), tensors, names) for number, entry in held["state"].items()}
    groups = [{name: value for name, value in group.items() if name != "params"} for group in held["param_groups"]]
    layout = {"state": slots, "groups": _pack(groups, "groups", tensors, names)}
    kept = {name: {k: _on_cpu(v) for k, v in found.items()} for name, found in (extra or {}).items() if found}
    return Checkpoint(step, weights, tensors, layout, state, kept)


def restore(checkpoint: Checkpoint, net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state back in place. Raises KeyError for a net of other parameters."""
    trained = trained_parameters(net)
    if set(trained) != set(checkpoint.weights):
        raise KeyError("the checkpoint holds other parameters than the model trains")
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(checkpoint.weights[name])
    tensors = checkpoint.optimizer
    state = {int(number): _unpack(entry, tensors) for number, entry in checkpoint.layout["state"].items()}
    kept = _unpack(checkpoint.layout["groups"], tensors)
    groups = [now | before for now, before in zip(optimizer.state_dict()["param_groups"], kept, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save(folder: Path, checkpoint: Checkpoint, keep: int, protected: Set[int] = frozenset()) -> Path:
    """Write `folder/step-N` and, once it is complete, remove the oldest beyond `keep` (0 keeps all).

    protected: steps whose checkpoints stay, however old. Raises RunError where it does not fit on the disk; nothing of
    it is left then.
    """
    target = folder / f"step-{checkpoint.step}"
    part = folder / f".{target.name}-{uuid.uuid4().hex[:8]}.part"
    try:
        part.mkdir(parents=True)
        if shutil.disk_usage(part).free < checkpoint.size:  # seen before all the room that there is has been taken
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(part, checkpoint)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if disk_full(error):
            raise RunError(_too_large(folder, checkpoint)) from error
        raise
    if target.exists():
        shutil.rmtree(target)
    part.rename(target)
    flush(folder)
    if keep:
        for step, old in _complete(folder)[:-keep]:
            if step not in protected:
                shutil.rmtree(old)
    for leftover in folder.glob(".step-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def _too_large(folder: Path, checkpoint: Checkpoint) -> str:
    stays = [step for step, _ in _complete(folder)]
    before = f"that of step {stays[-1]} stays" if stays else "there is none before it"
    return (
        f"the checkpoint of step {checkpoint.step} needs {checkpoint.size:,} bytes: {no_room(folder)}; {before}: make "
        "room (train.checkpoints_total_limit 1 keeps one at a time), then add --resume"
    )


def _write(part: Path, checkpoint: Checkpoint) -> None:
    """Fill a folder with a checkpoint's files, down to the disk."""
    save_file(checkpoint.weights, part / "weights.safetensors")
    save_file(checkpoint.optimizer, part / "optimizer.safetensors", {"layout": json.dumps(checkpoint.layout)})
    for name, tensors in checkpoint.extra.items():
        save_file(tensors, part / f"{name}.safetensors")
    state = {**checkpoint.state, "step": checkpoint.step}
    (part / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    sums = {path.name: sha256(path) for path in sorted(part.iterdir())}
    (part / MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    for path in [*part.iterdir(), part]:
        flush(path)


def newest(folder: Path) -> tuple[Checkpoint | None, list[Path]]:
    """The newest checkpoint whose files match their sums (None if there is none), and the damaged ones passed over."""
    damaged = []
    for step, path in reversed(_complete(folder)):
        if _intact(path):
            return _load(step, path), damaged
        damaged.append(path)
    return None, damaged


def at(folder: Path, step: int) -> Checkpoint | None:
    """The checkpoint of one step, if it is there and its files match their sums."""
    path = folder / f"step-{step}"
    return _load(step, path) if _intact(path) else None


def _load(step: int, path: Path) -> Checkpoint:
    parts = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        layout = json.loads(file.metadata()["layout"])
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(step, parts.pop("weights"), parts.pop("optimizer"), layout, state, parts)


def _pack(value: Any, name: str, tensors: dict[str, Tensor], names: dict[Any, str]) -> Any:
    """A part of an optimizer's state as JSON; its tensors go into `tensors`, a shared one once.

    JSON has no tuples and no tensors, so an object with the one key `tuple`, `tensor` or `dict` stands for these.
    names: what a tensor in memory was called already.
    """
    if isinstance(value, Tensor):
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if place not in names:
            names[place], tensors[name] = name, _on_cpu(value)
        return {"tensor": names[place]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _pack(entry, f"{name}.{key}", tensors, names) for key, entry in value.items()}}
    if isinstance(value, list | tuple):
        packed = [_pack(entry, f"{name}.{place}", tensors, names) for place, entry in enumerate(value)]
        return packed if isinstance(value, list) else {"tuple": packed}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the optimizer keeps {name}, a {type(value).__name__}, which no checkpoint can hold")


def _unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_pack` was given."""
    if isinstance(packed, list):
        return [_unpack(entry, tensors) for entry in packed]
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "tuple" in packed:
        return tuple(_unpack(entry, tensors) for entry in packed["tuple"])
    return {key: _unpack(entry, tensors) for key, entry in packed["dict"].items()}


def _on_cpu(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def _complete(folder: Path) -> list[tuple[int, Path]]:
    named = [path for path in folder.glob("step-*") if (path / MANIFEST).is_file()]
    return sorted((int(path.name.removeprefix("step-")), path) for path in named)


def _intact(path: Path) -> bool:
    try:
        sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return set(sums) >= NEEDED and all(sha256(path / name) == total for name, total in sums.items())
    except (OSError, ValueError, TypeError):
        return False
