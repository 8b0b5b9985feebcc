"""What checkpoints cost a training run on the embedded model, and how soon a signal ends it with one.

Trains `embedded-dpo` with EMA and a checkpoint every 50 steps, twice: written beside the training as always, and with
a loop that waits for each. Printed are the shares of the time that the loop waited, and the median seconds of a step
while a checkpoint was being written and otherwise. Then a third run gets SIGTERM, and the seconds until it has ended
are printed, with the step of the whole checkpoint that it left.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from diffpref.presets import preset
from diffpref.train.config import Config
from diffpref.train.config_file import to_yaml
from diffpref.train.kept import newest_whole
from diffpref.train.loop import train
from diffpref.train.step import Learner
from diffpref.train.writer import Writer


def waited(run: Path) -> float:
    """The share of its time that a run's loop waited for checkpoints, all logged steps together."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "checkpoint_wait" in line]
    working = [1 / line["pairs_per_second"] for line in lines]
    whole = [time / (1 - line["checkpoint_wait"]) for time, line in zip(working, lines, strict=True)]
    return 1 - sum(working) / sum(whole)


def timed_steps(config: Config) -> tuple[Path, list[float], list[float]]:
    """Train; the run folder, and the seconds of steps that began during a write and of the others."""
    real_step, real_write, writers = Learner.step, Writer.write, []
    during, beside = [], []

    def write(self: Writer, *how: object) -> None:
        writers[:] = [self]
        real_write(self, *how)

    def step(self: Learner, number: int, optimizer: object) -> object:
        writing = bool(writers) and writers[0]._writing is not None and not writers[0]._writing.done()
        started = time.perf_counter()
        found = real_step(self, number, optimizer)
        (during if writing else beside).append(time.perf_counter() - started)
        return found

    Writer.write, Learner.step = write, step
    try:
        return train(config), during, beside
    finally:
        Writer.write, Learner.step = real_write, real_step


def train_waiting(config: Config) -> Path:
    """Train with a loop that waits for every checkpoint."""
    real = Writer.write

    def write(self: Writer, *how: object) -> None:
        real(self, *how)
        started = time.perf_counter()
        self.wait()
        self.waited += time.perf_counter() - started

    Writer.write = write
    try:
        return train(config)
    finally:
        Writer.write = real


def ended_after(config: Config, file: Path) -> tuple[float, int | None]:
    """Seconds from SIGTERM to the end of a training process, and the step of the checkpoint that it left."""
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "diffpref", "train", "--config", str(file)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    metrics = Path(config.output_dir) / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count('"loss"') >= 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    process.wait()
    found, _ = newest_whole(Path(config.output_dir) / "checkpoints")
    return time.monotonic() - started, found.step if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def config(name: str) -> Config:
            base = preset("embedded-dpo")
            steps = replace(base.train, max_steps=arguments.steps, checkpointing_steps=arguments.every, ema=True)
            look, data = replace(base.validation, steps=0, prompts=None), replace(base.data, holdout=0.0)
            data = replace(data, cache=str(folder / "cache"))
            return replace(base, output_dir=str(folder / name), train=steps, validation=look, data=data)

        run, during, beside = timed_steps(config("beside"))
        found, _ = newest_whole(run / "checkpoints")
        size = found.bytes / 2**20 if found else 0.0
        print(f"a checkpoint of {size:.1f} MiB every {arguments.every} of {arguments.steps} steps")
        shares = waited(run), waited(train_waiting(config("waiting")))
        print(f"the loop waited {shares[0]:.3%} of the time; {shares[1]:.3%} if it waits for the disk")
        print(f"a step took {statistics.median(beside):.3f} s, and {len(during)} steps beside a write ", end="")
        print(f"{statistics.median(during):.3f} s" if during else "-")
        seconds, step = ended_after(config("told"), folder / "told.yaml")
        print(f"{seconds:.1f} s from SIGTERM to the end, with a whole checkpoint of step {step}")


if __name__ == "__main__":
    main()
