"""Our training steps and the published script's on a GPU, at the true sizes of SD1.5 and SDXL with random weights.

For each model and resolution: the published step at its own batch of one pair; a LoRA step that encodes each time too,
likewise; and ours, full and LoRA, at `--pairs` a step, with a live reference and with the reference cache. Each is
built anew and alone on the card. Printed are pairs a second, how many times as fast as the published step, the share of
the card's peak that useful FLOPs reach (MFU: those of policy forward and backward and of the reference, counted;
encoding and recomputation are not useful), the peak memory, and the share of time in which the step waited for its
data. A step that does not fit into the memory is said to be out of memory, and the next one runs.

    python benchmarks/gpu.py                                        # SD1.5 at 512, SDXL at 1024, bf16
    python benchmarks/gpu.py --runs sd15@512 sdxl@512 --pairs 16 --checkpointing
    python benchmarks/gpu.py --runs sd15@64 --width 0.1 --precision no --steps 2   # on a CPU, to see that it runs
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import Contestant, Equipment, configuration, equip, ours, prepare, published

from diffpref.train.config import Config

PEAKS = {  # dense bf16 FLOPs a second by NVIDIA's data sheets, of the first name that the card's contains
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
UNTIMED = 3  # steps
Build = Callable[[Equipment], Contestant]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["sd15@512", "sdxl@1024"], help="MODEL@RESOLUTION")
    parser.add_argument("--ways", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--pairs", type=int, default=8, help="of our steps")
    parser.add_argument("--steps", type=int, default=20, help="timed")
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--checkpointing", action="store_true", help="of our steps: activations are computed again")
    parser.add_argument("--compile", action="store_true", help="the blocks of our networks")
    parser.add_argument("--optimizer", default="adamw", help="of our steps")
    parser.add_argument("--peak", type=float, help="FLOPs a second of a card that this script does not know")
    parser.add_argument("--width", type=float, default=1.0, help="of the models' channels")
    parser.add_argument("--json", type=Path, help="write the figures into this file too")
    given = parser.parse_args(arguments)
    found = [row for run in given.runs for row in measure(run, given)]
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def measure(run: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model at one resolution, each printed when it is there."""
    model, resolution = run.split("@")
    steps = UNTIMED + given.steps
    plain = configuration(int(resolution), given.precision, 1, steps)
    mine = configuration(
        int(resolution),
        given.precision,
        given.pairs,
        steps,
        gradient_checkpointing=given.checkpointing,
        optimizer=given.optimizer,
        compile=given.compile,
    )
    print(f"\n{model} at {resolution} px on {card()}, {given.precision}, torch {torch.__version__}")
    print(f"{'':>22} {'pairs/step':>10} {'pairs/s':>9} {'ratio':>7} {'MFU':>6} {'peak GiB':>9} {'data wait':>9}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = prepare(Path(folder), model, given.width, mine)
        entries: list[tuple[str, Callable[[Equipment], Contestant], Config, bool]] = [
            ("published", published, plain, False)
        ]
        for way in given.ways:
            lora = way == "lora"
            entries += [("plain lora", published, plain, True)] if lora else []
            entries.append((f"ours {way}", lambda gear: ours(gear, cached=False), mine, lora))
            entries.append((f"ours {way}, cache", lambda gear: ours(gear, cached=True), mine, lora))
        for name, build, config, lora in entries:
            config = replace(config, model=path.model, data=path.data)
            row = alone(partial(build_alone, build, config, lora), given.steps, given.peak)
            rows.append({"run": run, "card": card(), "name": name, **row})
            show(name, row, rows[0].get("pairs_per_second"))
    return rows


def build_alone(build: Build, config: Config, lora: bool) -> Contestant:
    return build(equip(config, lora))


def alone(build: Callable[[], Contestant], steps: int, peak: float | None) -> dict[str, Any]:
    """Build a contestant on the empty card and measure it; {"out_of_memory": True} where it does not fit."""
    free()
    try:
        return timed(build(), steps, peak)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


def timed(contestant: Contestant, steps: int, peak: float | None) -> dict[str, Any]:
    """Figures of steps in a row, of which the device is waited for at the beginning and at the end alone."""
    for number in range(UNTIMED):
        contestant.step(number)
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    waited, started = contestant.waited, time.perf_counter()
    for number in range(UNTIMED, UNTIMED + steps):
        contestant.step(number)
    synchronize()
    seconds, waited = time.perf_counter() - started, contestant.waited - waited
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    flops = contestant.parts() / contestant.pairs
    contestant.close()
    speed = steps * contestant.pairs / seconds
    known = peak or peak_of(card())
    return {
        "pairs": contestant.pairs,
        "pairs_per_second": speed,
        "flops_per_pair": flops,
        "mfu": speed * flops / known if known else None,
        "peak_gib": memory,
        "data_wait": waited / seconds,
    }


def show(name: str, row: dict[str, Any], base: float | None) -> None:
    if "pairs_per_second" not in row:
        print(f"{name:>22} out of memory", flush=True)
        return
    ratio = f"{row['pairs_per_second'] / base:7.2f}" if base else f"{'-':>7}"
    mfu = f"{row['mfu']:6.1%}" if row["mfu"] is not None else f"{'-':>6}"
    memory = f"{row['peak_gib']:9.2f}" if row["peak_gib"] is not None else f"{'-':>9}"
    told = f"{row['pairs']:>10} {row['pairs_per_second']:9.3f} {ratio} {mfu} {memory} {row['data_wait']:9.1%}"
    print(f"{name:>22} {told}", flush=True)


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def peak_of(name: str) -> float | None:
    """The peak of a card that is known."""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Give the memory of what is gone back, and forget accelerate's settings: each contestant makes its own."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
