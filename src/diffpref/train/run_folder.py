"""The run folder: who may write into it, and its small files."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffpref.errors import UserError
from diffpref.files import flush, write_whole
from diffpref.redaction import command
from diffpref.train.config import Config
from diffpref.train.config_file import from_yaml, to_yaml

# What may change between a run and its continuation without making it another run.
# The batch may be split otherwise: `resume` compares what the parts multiply to.
FREE_TO_CHANGE = {"checkpointing_steps", "checkpoints_total_limit", "checkpoints_keep_every"}
FREE_TO_CHANGE |= {"logging_steps", "max_steps", "process_timeout"}
FREE_TO_CHANGE |= {"batch_size", "gradient_accumulation_steps", "micro_batch", "halve_on_out_of_memory"}
FREE_TO_CHANGE |= {"gradient_checkpointing", "compile", "channels_last", "offload_ema", "sampled_at_once"}  # last bits
SPEEDS = ("pairs_per_second", "data_wait", "checkpoint_wait")  # all of metrics.jsonl that depends on the machine
SCORE = "validation_score"  # in metrics.jsonl: the mean by the first scorer; with _NAME behind it that by each


class RunFolder:
    """The files of one run. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.final = path / "final"
        self._metrics = path / "metrics.jsonl"
        self._best = self.checkpoints / "best.json"

    def refuse_if_taken(self, config: Config, resume: bool) -> None:
        """Raise UserError if the folder holds another run, or one that is not to be resumed, or cannot be written."""
        held = self.path / "config.yaml"
        if held.is_file() and not resume:
            raise UserError(f"output_dir: {self.path} holds a run; add --resume to go on with it, or choose another")
        if held.is_file():
            _refuse_changes(from_yaml(held, Config()), config, held)
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not existing.is_dir():
            raise UserError(f"output_dir: {self.path} cannot be made: {existing} is a file")
        if not os.access(existing, os.W_OK):
            raise UserError(f"output_dir: no permission to write {existing}")

    def claim(self, config: Config) -> None:
        """Make the folder this run's: write its configuration and what it runs on."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir: cannot write {self.path}: {error.strerror}") from error
        write_whole(self.path / "config.yaml", to_yaml(config).encode())
        write_whole(self.path / "environment.json", json.dumps(_environment(), indent=1).encode())

    def rewind_metrics(self, step: int, looked: bool = True) -> None:
        """Forget logged lines after `step`: the run goes on from there and will log them again.

        Not `looked`: so will it those of looking at that step.
        """
        if not self._metrics.is_file():
            return

        def stays(line: str) -> bool:
            try:
                entry = json.loads(line)
                looks = any(key.startswith(("heldout_", SCORE)) for key in entry)
                return entry["step"] < step or (entry["step"] == step and (looked or not looks))
            except (ValueError, KeyError):  # a line cut off when the run was killed
                return False

        kept = [line for line in self._metrics.read_text(encoding="utf-8").splitlines() if stays(line)]
        write_whole(self._metrics, "".join(line + "\n" for line in kept).encode())

    def flush_metrics(self) -> None:
        """Bring metrics.jsonl onto the disk, so that it is never behind a checkpoint."""
        if self._metrics.is_file():
            flush(self._metrics)

    def mark_best(self, scorer: str) -> int | None:
        """Name in checkpoints/best.json the step after 0 with the highest mean score by `scorer`; that step.

        metrics.jsonl alone decides, of equal steps the first. Without any such step there is no mark.
        """
        key, best = f"{SCORE}_{scorer}", None
        for line in self._metrics.read_text(encoding="utf-8").splitlines() if self._metrics.is_file() else ():
            entry = json.loads(line)
            if entry["step"] > 0 and key in entry and (best is None or entry[key] > best[key]):
                best = entry
        if best is None:
            self._best.unlink(missing_ok=True)
            return None
        told = {"step": best["step"], "scorer": scorer, "value": best[key]}
        write_whole(self._best, (json.dumps(told, indent=1) + "\n").encode())
        return best["step"]

    def best(self) -> dict[str, Any] | None:
        """What `mark_best` wrote: step, scorer and value; None where there is no mark."""
        try:
            return json.loads(self._best.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def list_skipped(self, rows: list[dict[str, str]]) -> None:
        """Name the rows that could not be read, in skipped_rows.json."""
        (self.path / "skipped_rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")

    def log(self, entry: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _refuse_changes(held: Config, config: Config, file: Path) -> None:
    for group in ("model", "data", "objective", "points", "train"):
        before, now = (dataclasses.asdict(getattr(entry, group)) for entry in (held, config))
        for key in sorted(set(before) | set(now)):
            if key not in FREE_TO_CHANGE and before.get(key) != now.get(key):
                raise UserError(
                    f"{group}.{key}: the run to resume has {before.get(key)!r} ({file}), not {now.get(key)!r}"
                )


def _environment() -> dict[str, Any]:
    import torch

    packages = ("diffpref", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors")
    return {
        "command": command(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }
