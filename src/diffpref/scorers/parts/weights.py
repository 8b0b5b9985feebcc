"""Weights of scorers: where they are, what they are, and how a network gets them. No code in them is ever run.

A place is a file, a folder, or a hub id of the form owner/name, whose files are fetched into the hub's cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffpref import hub
from diffpref.errors import UserError, first_line
from diffpref.files import sha256

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpref.scorers.base import Precision

log = logging.getLogger("diffpref")

MODEL_FILES = (  # by which names a whole model is found, the safer ones first
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_warned: set[str] = set()
Network = TypeVar("Network", bound="torch.nn.Module")


def find(place: str, names: Sequence[str], scorer: str) -> Path:
    """A local file: the place itself, or the first of `names` that its folder or hub repository has.

    Of an `.index.json` the shards are fetched too. Raises UserError of one line where there is none.
    """
    found = look(place, names, scorer)
    if found is None:
        there = sorted(path.name for path in Path(place).iterdir()) if Path(place).is_dir() else []
        has = f"; it has {', '.join(there[:8])}{' ...' * (len(there) > 8)}" if there else ""
        raise UserError(f"{scorer}: {place} has none of {', '.join(names)}{has}")
    return found


def look(place: str, names: Sequence[str], scorer: str) -> Path | None:
    """As `find`, but None where the folder or repository is there and has none of the files."""
    path = Path(place)
    if path.is_file():
        return path
    if path.is_dir():
        return next((path / name for name in names if (path / name).is_file()), None)
    if place.startswith((".", "/", "~")) or place.count("/") != 1:
        raise UserError(f"{scorer}: {place} is no file, no folder and no hub id of the form owner/name")
    return _fetch(place, names, scorer)


def _fetch(repository: str, names: Sequence[str], scorer: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str, here: bool) -> Path:
        return Path(hub.ask(f"{repository}/{name}", lambda: hf_hub_download(repository, name, local_files_only=here)))

    unreached: Exception | None = None
    for name in names:
        down = unreached is not None and hub.passes(unreached)  # then it is not asked for the other names too
        try:
            found = fetch(name, down)
            for shard in _shards(found) if name.endswith(".index.json") else ():
                fetch(shard.name, down)
            return found
        except LocalEntryNotFoundError as error:  # out of reach, and not in the cache: another name may be
            unreached = unreached or error
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's client raises many kinds: HTTP, not found, gated, bad id
            raise _gone(f"{repository}, {name},", scorer, error) from error
    if unreached is not None:
        raise _gone(f"{repository}, {names[0]},", scorer, unreached)
    return None


def _gone(what: str, scorer: str, error: Exception) -> Exception:
    line = f"{scorer}: {what} is no file or folder here and could not be fetched: {hub.explained(error)}"
    return hub.refusal(f"{line}; give weights that you have as NAME=WEIGHTS", error)


def digest(file: Path) -> str:
    """SHA-256 of a weights file in hex; of an index, of its shards' sums in the order of their names."""
    if not file.name.endswith(".index.json"):
        return _digest(file, file.stat().st_size, file.stat().st_mtime_ns)
    return hashlib.sha256("".join(map(digest, _shards(file))).encode()).hexdigest()


@lru_cache(maxsize=64)
def _digest(file: Path, size: int, changed: int) -> str:
    """The sum of a file of that size and time, read once, for several scorers may stand on gigabytes of it."""
    return sha256(file)


def label(file: Path, total: str, known: Mapping[str, str], scorer: str) -> str:
    """What weights of that SHA-256 are called: their name among the known ones, else the file's, with a warning.

    The warning comes once for each sum. known: names by SHA-256.
    """
    if total in known:
        return known[total]
    if total not in _warned:
        _warned.add(total)
        log.warning("%s: the weights %s (SHA-256 %s) are none that diffpref knows", scorer, file, total)
    return file.name


def read(file: Path, scorer: str) -> dict[str, Tensor]:
    """A file's tensors by name: safetensors, an index of them, or what torch.save wrote of tensors alone.

    A dictionary within `state_dict` and names that all begin with `module.` are unpacked; buffers of positions, which
    old checkpoints hold and networks no longer have, are left out. Raises UserError for a file that is damaged, and for
    one that cannot be read without running code of its own.
    """
    tensors = _unpacked(_load(file, scorer), file, scorer)
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return {name: value for name, value in tensors.items() if not name.endswith("position_ids")}


def _load(file: Path, scorer: str) -> Any:
    import torch
    from safetensors.torch import load_file

    try:
        if file.name.endswith(".index.json"):
            return {name: value for shard in _shards(file) for name, value in load_file(shard).items()}
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # each format and each kind of damage raises its own
        if "weights_only" in str(error):
            reason = "it is damaged, or holds more than tensors so that reading it would run code"
            raise UserError(f"{scorer}: {file} is refused: {reason}; save its tensors as safetensors") from None
        raise UserError(f"{scorer}: {file} cannot be read as weights: {first_line(error)}") from error


def _unpacked(content: Any, file: Path, scorer: str) -> dict[str, Tensor]:
    import torch

    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{scorer}: {file} holds no tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{scorer}: {file} holds a {type(value).__name__} as {name!r}, where tensors are expected")
    return content


def _shards(index: Path) -> list[Path]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [index.with_name(Path(name).name) for name in sorted(set(names))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read as an index of weights: {first_line(error)}") from error


def dtype_of(precision: Precision, device: str) -> torch.dtype:
    """The dtype of weights; raises UserError for fp16 on a CPU, which fails only in the forward."""
    import torch

    if precision == "fp16" and torch.device(device).type == "cpu":
        raise UserError("precision: fp16 does not run on a CPU; use bf16 or fp32")
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def build(
    make: Callable[[], Network], state: Mapping[str, Tensor], what: str, dtype: torch.dtype, device: str
) -> Network:
    """The network that `make` makes, with these weights, frozen, in a dtype on a device.

    Nothing is drawn at random and nothing stays as it was made: the names and shapes must be the network's own. what:
    the file and what it should be, for the message. Raises UserError with the first key that differs.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = make()
    if wrong := next(_differences(network.state_dict(), state), None):
        raise UserError(f"{what}: {wrong}")
    network.load_state_dict(state, assign=True)
    return network.to(device, dtype).eval().requires_grad_(False)


def _differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[str]:
    missing = [name for name in wanted if name not in given]
    strange = [name for name in given if name not in wanted]
    both = [
        f"{len(names)} keys {kind}, the first {names[0]}"
        for kind, names in (("missing", missing), ("unexpected", strange))
        if names
    ]
    if both:
        yield "; ".join(both)
    for name, value in wanted.items():
        if name in given and given[name].shape != value.shape:
            yield f"{name} has the shape {tuple(given[name].shape)}, where {tuple(value.shape)} is expected"
