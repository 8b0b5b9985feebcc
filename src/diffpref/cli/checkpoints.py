"""`diffpref checkpoints RUN [--json]`: which checkpoints a run holds, and whether they are whole."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from diffpref.cli.parsing import parse
from diffpref.cli.tables import aligned
from diffpref.errors import RunError, UserError


@dataclass(frozen=True)
class Options:
    """List a run's checkpoints and hold every file against its SHA-256; exit code 1 where one is damaged."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder: `output_dir` of its training."""
    json: bool = False
    """Print the list as JSON."""


def main(arguments: list[str]) -> None:
    """List and verify. Raises RunError if a checkpoint is damaged."""
    options = parse(Options, arguments, "diffpref checkpoints")
    folder = options.run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{options.run} is no run folder: it has no {folder.name}/ in it{_hint(options.run)}")

    from diffpref.train.kept import kept
    from diffpref.train.run_folder import RunFolder

    mark = RunFolder(options.run).best()
    told = (_entry(found, mark["step"] if mark else None) for found in kept(folder))
    entries = [entry for entry in told if entry]
    whole = [entry["step"] for entry in entries if not entry["damage"]]
    if options.json:
        print(json.dumps({"checkpoints": entries, "resumes": max(whole, default=None), "best": mark}, indent=1))
    else:
        print(_table(entries))
        print(f"\n--resume goes on from step {max(whole)}" if whole else "\n--resume starts from the beginning")
        if mark:
            print(f"best: step {mark['step']}, {mark['value']:.4g} by {mark['scorer']}")
    if damaged := [f"step {entry['step']} ({entry['damage']})" for entry in entries if entry["damage"]]:
        raise RunError(f"{len(damaged)} of {len(entries)} checkpoints damaged: {'; '.join(damaged)}")


def _entry(found: Any, best: int | None) -> dict[str, Any] | None:
    """What there is to tell of a checkpoint; of a damaged one only its step, its size and its damage.

    None for one that the run, which is still training, removed meanwhile.
    """
    try:
        entry = {"step": found.step, "bytes": found.bytes, "damage": found.damage, "best": found.step == best}
        if not found.damage:
            state = found.state()
            entry |= {name: state[name] for name in ("processes", "items_per_step", "looked")}
            entry["parts"] = found.parts
    except FileNotFoundError:
        entry = None
    return entry if found.path.is_dir() else None


def _table(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return "no checkpoints"
    rows = [["state", "holds", "step", "bytes", "processes", "items a step"]]
    for entry in entries:
        state = "damaged" if entry["damage"] else "best, whole" if entry["best"] else "whole"
        counts = [f"{entry[name]:,}" if name in entry else "-" for name in ("processes", "items_per_step")]
        rows.append([state, ", ".join(entry.get("parts", ["-"])), f"{entry['step']}", f"{entry['bytes']:,}", *counts])
    return aligned(rows, texts=2)


def _hint(run: Path) -> str:
    if not run.exists():
        return ", and it does not exist"
    inside = run.name == "checkpoints" or run.parent.name == "checkpoints"
    owner = run.parent if run.name == "checkpoints" else run.parent.parent
    return f"; did you mean {owner}?" if inside else ""
