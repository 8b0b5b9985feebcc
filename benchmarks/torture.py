"""Kill training runs with SIGKILL at random moments, resume them, and compare with runs that nobody killed.

Three runs on the embedded model: Diffusion-DPO of the whole network, Diffusion-DRO with a replay buffer that keeps
trajectories, and Diffusion-DPO with LoRA, all with EMA, the first also with validation and a best checkpoint. A share
of the kills is aimed at a checkpoint that is being written. After every kill the newest whole checkpoint must equal,
bit for bit, the uncut run's of that step: weights, optimizer, average, replay buffer, guard, position. At the end of a
run so must its final weights, every logged line but for speeds, the mark of the best step, and the samples of each
step.

Every attempt is forked from one process that has imported torch. Ends with exit code 1 if anything differed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from safetensors.torch import load_file
from support.forking import fork, warm

from diffpref.__main__ import main as diffpref
from diffpref.data.importing import import_source
from diffpref.embedded import PREFERENCES
from diffpref.points import Replay
from diffpref.presets import preset
from diffpref.train.checkpoint import Checkpoint, load
from diffpref.train.config import Config
from diffpref.train.config_file import to_yaml
from diffpref.train.kept import kept, newest_whole
from diffpref.train.run_folder import SPEEDS
from diffpref.train.seen import Seen
from diffpref.train.step import Learner

AIMED = 0.4  # the share of kills that wait for a checkpoint that is being written
STEPS, EVERY, LOOKS = 24, 3, 8


def runs(folder: Path) -> dict[str, Config]:
    """The configurations by name; their checkpoints are all kept."""

    def small(name: str, **parts: object) -> Config:
        config = preset(name)
        train = replace(config.train, max_steps=STEPS, batch_size=2, ema=True, ema_decay=0.9)
        train = replace(train, checkpointing_steps=EVERY, checkpoints_total_limit=0)
        data = replace(config.data, path=str(folder / "data"), cache=str(folder / "cache"), holdout=0.0)
        validation = replace(config.validation, prompts=None, steps=0)
        return replace(config, **{"train": train, "data": data, "validation": validation, **parts})

    dpo = small("embedded-dpo")
    look = replace(dpo.validation, prompts="embedded", steps=LOOKS, images=2, num_inference_steps=2, pairs=8)
    look = replace(look, scorer="embedded-judge")
    replay = Replay(sampler="ddim", steps=4, trajectories=2, refresh_steps=2, policy_copy_steps=3)
    return {
        "DPO": replace(dpo, validation=look, data=replace(dpo.data, holdout=0.02)),
        "DRO": small("embedded-dro", points=replay),
        "LoRA": small("embedded-dpo-lora"),
    }


def attempt(config: Config, file: Path) -> int:
    """Start or resume a run in a forked process, which notes the samples of its steps; the process's number."""
    run = Path(config.output_dir)

    def go() -> int:
        log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        torch.set_num_threads(1)
        take, add, now = Learner.step, Seen.add, []

        def step(self: Learner, number: int, optimizer: object) -> object:
            now[:] = [number]
            return take(self, number, optimizer)

        def noted(self: Seen, places: list[int], names: tuple[str, ...], *rest: object) -> None:
            with run.with_suffix(".order").open("a") as order:
                order.write(f"\n{json.dumps([now[0], places[0], names])}")
            add(self, places, names, *rest)

        Learner.step, Seen.add = step, noted
        return diffpref(["train", "--config", str(file), "--resume"])

    file.write_text(to_yaml(config))
    return fork(go)


def writing(run: Path) -> bool:
    """Whether a checkpoint is being written, or was when its process died."""
    return any((run / "checkpoints").glob(".step-*.part"))


def strike(process: int, run: Path, seconds: float, draw: random.Random) -> bool:
    """Kill a process at a random moment of the next seconds, or as it writes; False if it ended before."""
    leave, aimed = time.monotonic() + draw.uniform(0, seconds), draw.random() < AIMED
    saves, after, before = draw.randint(1, 4), draw.uniform(0, 0.01), writing(run)
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if code := os.waitstatus_to_exitcode(status):
                raise SystemExit(f"{run}: an attempt ended with {code}; see {run.with_suffix('.log')}")
            return False
        now = writing(run)
        saves, before = saves - (now and not before), now
        if (aimed and saves <= 0) or (not aimed and time.monotonic() > leave):
            time.sleep(after if aimed else 0)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return True
        time.sleep(0.0005)


def parts(checkpoint: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    return {"weights": checkpoint.weights, "optimizer": checkpoint.optimizer, **checkpoint.extra}


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items()
    )


def checkpoint_differences(run: Path, uncut: Path) -> list[str]:
    """What differs between a run's newest whole checkpoint and the uncut run's of the same step."""
    found, damaged = newest_whole(run / "checkpoints")
    if damaged:
        return [f"{each.path} is damaged: {each.damage}" for each in damaged]
    if found is None:
        return []
    ours, theirs = load(found), load(next(each for each in kept(uncut / "checkpoints") if each.step == found.step))
    if parts(ours).keys() != parts(theirs).keys():
        return [f"step {found.step}: other parts"]
    names = [name for name, tensors in parts(ours).items() if not same_tensors(tensors, parts(theirs)[name])]
    names += ["layout"] * (ours.layout != theirs.layout) + ["state"] * (ours.state != theirs.state)
    return [f"step {found.step}: {name}" for name in names]


def logged(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines]


def order(run: Path) -> dict[tuple[int, int], set[tuple[str, ...]]]:
    """The samples of each micro-batch, of all attempts that took it; what a kill cut off is left out."""
    found: dict[tuple[int, int], set[tuple[str, ...]]] = {}
    for line in run.with_suffix(".order").read_text().splitlines():
        if line.endswith("]]"):
            step, place, names = json.loads(line)
            found.setdefault((step, place), set()).add(tuple(names))
    if {step for step, _ in found} != set(range(STEPS)):
        raise SystemExit(f"{run}: not every step noted its samples")
    return found


def end_differences(run: Path, uncut: Path) -> list[str]:
    """What differs between two finished runs besides their checkpoints."""
    finals = [sorted(each.rglob("*.safetensors")) for each in (run / "final", uncut / "final")]
    same = all(same_tensors(load_file(a), load_file(b)) for a, b in zip(*finals, strict=True))
    marks = [(each / "checkpoints" / "best.json") for each in (run, uncut)]
    told = [mark.read_text() if mark.exists() else None for mark in marks]
    found = [] if same and finals[0] else ["final"]
    found += ["metrics.jsonl"] * (logged(run) != logged(uncut)) + ["best.json"] * (told[0] != told[1])
    return found + ["sample order"] * (order(run) != order(uncut))


def torture(name: str, config: Config, folder: Path, kills: int, draw: random.Random) -> Counter[str]:
    """Kill a run so often, from its start again where it was done; what happened, and how much differed."""
    started = time.monotonic()
    uncut, run, file = folder / name / "uncut", folder / name / "cut", folder / name / "config.yaml"
    uncut.parent.mkdir()
    process = attempt(replace(config, output_dir=str(uncut)), file)
    if os.waitpid(process, 0)[1]:
        raise SystemExit(f"{uncut} failed; see {uncut.with_suffix('.log')}")
    seconds = time.monotonic() - started
    config = replace(config, output_dir=str(run), train=replace(config.train, checkpoints_total_limit=2))
    counts: Counter[str] = Counter()
    while True:
        process = attempt(config, file)
        if counts["kills"] < kills and strike(process, run, seconds, draw):
            counts["kills"] += 1
            counts["inside a save"] += writing(run)
            counts["before a checkpoint"] += not kept(run / "checkpoints")
            differences = checkpoint_differences(run, uncut)
            counts["compared after a kill"] += 1
        else:
            if counts["kills"] == kills:
                os.waitpid(process, 0)
            differences = checkpoint_differences(run, uncut) + end_differences(run, uncut)
            counts["runs compared whole"] += 1
            shutil.rmtree(run)
            for suffix in (".order", ".log"):
                run.with_suffix(suffix).unlink()
        counts["differences"] += len(differences)
        for difference in differences:
            print(f"{name}: {difference}", file=sys.stderr)
        if not run.exists() and counts["kills"] == kills:
            return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warm()
    draw, total, started = random.Random(arguments.seed), Counter(), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.waitpid(fork(lambda: bool(import_source("pickapic", PREFERENCES, folder / "data")) - 1), 0)
        configs = runs(folder)
        stored = replace(configs["DPO"], output_dir=str(folder / "stored"))  # its store of latents serves all
        stored = replace(stored, train=replace(stored.train, max_steps=1))
        os.waitpid(attempt(stored, folder / "stored.yaml"), 0)
        for number, (name, config) in enumerate(configs.items()):
            share = arguments.kills // len(configs) + (number < arguments.kills % len(configs))
            counts = torture(name, config, folder, share, draw)
            total += counts
            print(f"{name:<6}{', '.join(f'{value} {key}' for key, value in counts.items())}", flush=True)
    print(f"{'all':<6}{', '.join(f'{value} {key}' for key, value in total.items())}", end="")
    print(f"; {total['differences']} differences, {time.monotonic() - started:.0f} s")
    return int(total["differences"] > 0)


if __name__ == "__main__":
    sys.exit(main())
