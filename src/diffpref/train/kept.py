"""Which checkpoints a run holds, whether they are whole, and which of them go. No tensors here, so it imports no torch.

A checkpoint is a folder `step-N` with a `manifest.json`: of each file its bytes and its SHA-256, and `sum`, the SHA-256
of that list itself. So a flipped bit in any file, a cut or missing one, and a folder under another step's name show.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffpref.files import sha256

MANIFEST = "manifest.json"
NEEDED = {"weights.safetensors", "optimizer.safetensors", "state.json"}


@dataclass(frozen=True)
class Kept:
    """A checkpoint's folder, and the step that its name tells."""

    step: int
    path: Path

    @cached_property
    def damage(self) -> str | None:
        """What is wrong with it, in a few words; None where every file matches its sum. Reads all of it."""
        try:
            content = (self.path / MANIFEST).read_bytes()
            files = json.loads(content)["files"]
            if content != _manifest(files):
                return f"{MANIFEST} does not match its own sum"
            found = {file.name: file.stat().st_size for file in self.path.iterdir() if file.name != MANIFEST}
            if missing := sorted((set(files) | NEEDED) - set(found)):
                return f"{missing[0]} is missing"
            if unsummed := sorted(NEEDED - set(files)):
                return f"{MANIFEST} does not name {unsummed[0]}"
            for name, told in sorted(files.items()):
                if found[name] != told["bytes"]:
                    return f"{name} has {found[name]:,} bytes instead of {told['bytes']:,}"
                if sha256(self.path / name) != told["sha256"]:
                    return f"{name} does not match its sum"
            if self.state()["step"] != self.step:
                return f"it is the checkpoint of step {self.state()['step']}"
        except OSError as error:
            return f"{Path(error.filename or self.path).name}: {error.strerror}"
        except (ValueError, TypeError, KeyError):
            return f"{MANIFEST} cannot be read"
        return None

    @property
    def bytes(self) -> int:
        """What its files take."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    @property
    def parts(self) -> list[str]:
        """Which files of tensors are in it, by the manifest alone: `weights`, `optimizer`, and what else the run has.

        Raises OSError or ValueError where the manifest cannot be read.
        """
        files = json.loads((self.path / MANIFEST).read_bytes())["files"]
        names = sorted(Path(name).stem for name in files if name.endswith(".safetensors"))
        return sorted(names, key=lambda name: ("weights", "optimizer", name).index(name))

    def state(self) -> dict[str, Any]:
        """The position and the counters. Raises OSError or ValueError where they cannot be read."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))


def kept(folder: Path) -> list[Kept]:
    """The checkpoints in a run's folder of them, by step."""
    named = ((re.fullmatch(r"step-(0|[1-9]\d*)", path.name), path) for path in folder.glob("step-*") if path.is_dir())
    return sorted((Kept(int(match[1]), path) for match, path in named if match), key=lambda found: found.step)


def newest_whole(folder: Path) -> tuple[Kept | None, list[Kept]]:
    """The newest checkpoint that is whole (None if there is none), and the damaged ones that are newer."""
    damaged = []
    for found in reversed(kept(folder)):
        if found.damage is None:
            return found, damaged
        damaged.append(found)
    return None, damaged


def write_manifest(folder: Path) -> None:
    """Sum the files of a folder; to be called when all others are written."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_bytes(_manifest(files))


def superseded(steps: Iterable[int], written: int, last: int, every: int, protected: Set[int]) -> list[int]:
    """Which checkpoints go once that of step `written` is complete.

    Of those up to there the `last` newest stay (0: all), those of a multiple of `every` steps (0: none for that), and
    those that are `protected`. Later ones, which a resume passed over as damaged, count for nothing.
    """
    if not last:
        return []
    older = sorted(step for step in steps if step <= written)[:-last]
    return [step for step in older if step not in protected and not (every and step and step % every == 0)]


def _manifest(files: dict[str, Any]) -> bytes:
    told = json.dumps(files, indent=1, sort_keys=True)
    total = hashlib.sha256(told.encode()).hexdigest()
    return (json.dumps({"files": files, "sum": total}, indent=1, sort_keys=True) + "\n").encode()
