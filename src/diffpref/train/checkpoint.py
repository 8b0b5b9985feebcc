"""Checkpoints: copied to the host, then written beside, summed, flushed, renamed; `kept.py` says which are whole.

Content: `weights.safetensors` (what trains), `optimizer.safetensors` (its tensors, and in the header as JSON how they
and its numbers fit together), `ema`, `reference` and `points.safetensors` where a run has these, `state.json` (position
and counters) and `manifest.json` (the sum of each). Nothing is pickled.
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
from diffpref.files import disk_full, flush, no_room
from diffpref.sharding import put, split, wholes
from diffpref.train.kept import Kept, kept, newest_whole, superseded, write_manifest
from diffpref.train.optimizers import trained_parameters


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    optimizer: `<parameter number>.<state name>` -> tensor. layout: the optimizer's state and groups as JSON, in which
    {"tensor": NAME} stands for one of these tensors. extra: by the name of its file what else a run has: the averaged
    weights (`ema`), a moving `reference`, the replay buffer (`points`). copied: what tells that a GPU's copies, which
    nobody waited for, have arrived.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    layout: dict[str, Any]
    state: dict[str, Any]
    extra: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    copied: torch.cuda.Event | None = None

    @property
    def size(self) -> int:
        """The bytes of its tensors, which are all but some thousand of those of its files."""
        parts = (self.weights, self.optimizer, *self.extra.values())
        return sum(tensor.nbytes for part in parts for tensor in part.values())


class Host:
    """Memory on the host for the copies of one checkpoint at a time; the next one takes the same again.

    To pin memory for a GPU's copies, and to touch new memory at all, takes far longer than the copying.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def copy(self, name: str, value: Tensor) -> Tensor:
        """A copy of a tensor under its name. From a GPU it is only on its way: behind the work that is queued there."""
        held = self._held.get(name)
        if held is None or (held.shape, held.dtype) != (value.shape, value.dtype):
            held = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._held[name] = held
        return held.copy_(value.detach(), non_blocking=True)


def joined(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What trains, the optimizer's state and `extra`, whole. Where they are split over processes, all must call it."""
    return wholes(trained_parameters(net)), wholes(optimizer.state_dict()), wholes(extra)


def capture(
    step: int,
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    extra: dict[str, dict[str, Tensor]] | None = None,
    host: Host | None = None,
) -> Checkpoint:
    """The checkpoint of a net's trainable weights and its optimizer after `step` steps; `state` goes into JSON.

    All tensors are copies, so that training may go on. extra: as in Checkpoint; what is empty is left out. host: whose
    memory is used, and must not be in use by a former checkpoint any more. Meanwhile other processes that have parts of
    these must call `joined`.

    Raises TypeError for an optimizer that keeps something else than tensors, numbers, texts and lists of these.
    """
    host = host or Host()
    trained, held, extra = joined(net, optimizer, extra or {})
    weights = {name: host.copy(f"weights {name}", value) for name, value in trained.items()}
    tensors, names = {}, {}
    slots = {str(number): _pack(entry, str(number), tensors, names) for number, entry in held["state"].items()}
    groups = [{name: value for name, value in group.items() if name != "params"} for group in held["param_groups"]]
    layout = {"state": slots, "groups": _pack(groups, "groups", tensors, names)}
    tensors = {name: host.copy(f"optimizer {name}", value) for name, value in tensors.items()}
    more = {
        part: {name: host.copy(f"{part} {name}", value) for name, value in found.items()}
        for part, found in extra.items()
        if found
    }
    return Checkpoint(step, weights, tensors, layout, state, more, _mark(next(iter(trained.values())).device))


def restore(checkpoint: Checkpoint, net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state back in place. Raises KeyError for a net of other parameters."""
    trained = trained_parameters(net)
    if set(trained) != set(checkpoint.weights):
        raise KeyError("the checkpoint holds other parameters than the model trains")
    with torch.no_grad():
        for name, value in trained.items():
            put(checkpoint.weights[name], value)
    tensors, parameters = checkpoint.optimizer, [each for group in optimizer.param_groups for each in group["params"]]
    state = {
        int(number): _split(_unpack(entry, tensors), parameters[int(number)])
        for number, entry in checkpoint.layout["state"].items()
    }
    kept = _unpack(checkpoint.layout["groups"], tensors)
    groups = [now | before for now, before in zip(optimizer.state_dict()["param_groups"], kept, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _as_laid_out(optimizer)


def _split(entry: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """A parameter's entry in an optimizer's state, split as the parameter is: all in it that is of its shape."""
    alike = {name for name, value in entry.items() if isinstance(value, Tensor) and value.shape == parameter.shape}
    return {name: split(value, parameter) if name in alike else value for name, value in entry.items()}


def _as_laid_out(optimizer: torch.optim.Optimizer) -> None:
    """Lay the optimizer's tensors out in memory as their parameters are: fused steps go through both side by side."""
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def save(
    folder: Path, checkpoint: Checkpoint, keep: int, protected: Set[int] = frozenset(), keep_every: int = 0
) -> Path:
    """Write `folder/step-N` and, once it is complete, remove what `superseded` says.

    keep: so many of the newest stay; 0 keeps all. keep_every: those of a multiple of so many steps stay too.
    protected: steps whose checkpoints stay, however old. Raises RunError where it does not fit on the disk, and OSError
    or SafetensorError where it cannot be written; then nothing of it is left, and no other checkpoint is touched.
    """
    target = folder / f"step-{checkpoint.step}"
    part = _aside(target)
    for leftover in folder.glob(".step-*.part"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if checkpoint.copied:
        checkpoint.copied.synchronize()
    try:
        part.mkdir(parents=True)
        if shutil.disk_usage(part).free < checkpoint.size:  # seen before all the room that there is has been taken
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(checkpoint.weights, part / "weights.safetensors")
        save_file(checkpoint.optimizer, part / "optimizer.safetensors", {"layout": json.dumps(checkpoint.layout)})
        for name, tensors in checkpoint.extra.items():
            save_file(tensors, part / f"{name}.safetensors")
        state = {**checkpoint.state, "step": checkpoint.step}
        (part / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        write_manifest(part)
        for path in [*part.iterdir(), part]:
            flush(path)
        if target.exists():  # a damaged one, which a resume passed over
            _remove(target)
        part.rename(target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if disk_full(error):
            raise RunError(_too_large(folder, checkpoint)) from error
        raise
    flush(folder)
    steps = {found.step: found.path for found in kept(folder)}
    for step in superseded(steps, checkpoint.step, keep, keep_every, protected):
        _remove(steps[step])
    return target


def _too_large(folder: Path, checkpoint: Checkpoint) -> str:
    stays = max((found.step for found in kept(folder)), default=None)
    before = "there is none before it" if stays is None else f"that of step {stays} stays"
    return (
        f"the checkpoint of step {checkpoint.step} needs {checkpoint.size:,} bytes: {no_room(folder)}; {before}: make "
        "room (train.checkpoints_total_limit 1 keeps one at a time), then add --resume"
    )


def newest(folder: Path) -> tuple[Checkpoint | None, list[Path]]:
    """The newest checkpoint that is whole (None if there is none), and the damaged ones passed over."""
    found, damaged = newest_whole(folder)
    return load(found) if found else None, [each.path for each in damaged]


def at(folder: Path, step: int) -> Checkpoint | None:
    """The checkpoint of one step, if it is there and whole."""
    found = Kept(step, folder / f"step-{step}")
    return load(found) if found.damage is None else None


def load(found: Kept) -> Checkpoint:
    """Read a checkpoint that is known to be whole."""
    parts = {name: load_file(found.path / f"{name}.safetensors") for name in found.parts}
    with safe_open(found.path / "optimizer.safetensors", "pt") as file:
        layout = json.loads(file.metadata()["layout"])
    return Checkpoint(found.step, parts.pop("weights"), parts.pop("optimizer"), layout, found.state(), parts)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.part")


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed meanwhile, it leaves none that looks damaged."""
    shutil.rmtree(path.rename(_aside(path)))


def _pack(value: Any, name: str, tensors: dict[str, Tensor], names: dict[Any, str]) -> Any:
    """A part of an optimizer's state as JSON; its tensors go into `tensors`, a shared one once.

    JSON has no tuples and no tensors, so an object with the one key `tuple`, `tensor` or `dict` stands for these.
    names: what a tensor in memory was called already.
    """
    if isinstance(value, Tensor):
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if place not in names:
            names[place], tensors[name] = name, value
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


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """An event behind what is queued on a GPU by now. Who waits for it sleeps, and takes no core."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event
