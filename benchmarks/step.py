"""Pairs a second of our training steps against the published script's, at SD1.5's proportions on a CPU.

All train the same random Stable Diffusion network (fp32, DPO, one pair a step unless told otherwise): the published
step, which encodes images and prompts each time and runs two networks; a plain LoRA step, which encodes each time too;
and ours, full and LoRA, with a live reference and with the reference cache. They take turns in one run. Printed are the
medians of the rounds, of the rounds' ratios beside the least that each has to reach, and the FLOPs of a step beside
those of policy forward, backward and reference. By the clock, and by processor's time, which other programs on the
machine disturb less.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from contestants import Contestant, configuration, equip, ours, prepare, published

from diffpref.reference import frozen_copy
from diffpref.train.optimizers import make_optimizer

UNTIMED = 1  # rounds
PUBLISHED, PLAIN = "published", "plain LoRA"
BOUNDS = {  # (ours, theirs): at least so many times as fast
    ("ours full", PUBLISHED): 1.45,
    ("ours LoRA", PUBLISHED): 2.1,
    ("ours LoRA", PLAIN): 1.4,
    ("ours full, cache", PUBLISHED): 1.7,
    ("ours LoRA, cache", PUBLISHED): 2.5,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=0.5, help="of SD1.5's channels")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=1, help="a step")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(given.resolution, "no", given.pairs, UNTIMED + given.rounds)
        report(race(contestants(Path(folder), given.width, config), given.rounds), given)


def contestants(folder: Path, width: float, config) -> dict[str, Contestant]:
    """All of them, on two networks: the learning rate is so small that no one's step changes another's work."""
    config = prepare(folder, "sd15", width, config)
    full, lora = equip(config, lora=False), equip(config, lora=True)
    fused, copied = make_optimizer(full.trained, config.train), frozen_copy(full.backbone)
    small = make_optimizer(lora.trained, config.train)
    return {
        PUBLISHED: published(full),
        PLAIN: published(lora),
        "ours full": ours(full, False, copied, fused),
        "ours full, cache": ours(full, True, None, fused),
        "ours LoRA": ours(lora, False, None, small),
        "ours LoRA, cache": ours(lora, True, None, small),
    }


def race(racing: dict[str, Contestant], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each contestant's rounds, by the clock and by the processor; then FLOPs, which are printed."""
    times = {"clock": {name: [] for name in racing}, "processor": {name: [] for name in racing}}
    for number in range(UNTIMED + rounds):
        for name, contestant in racing.items():
            clock, processor = time.perf_counter(), time.process_time()
            contestant.step(number)
            if number >= UNTIMED:
                times["clock"][name].append(time.perf_counter() - clock)
                times["processor"][name].append(time.process_time() - processor)
    print(f"{'FLOPs a step (G)':>20} {'whole step':>12} {'parts':>12} {'more':>8}")
    for name, contestant in racing.items():
        whole, parts = contestant.flops(), contestant.parts()
        print(f"{name:>20} {whole / 1e9:12.1f} {parts / 1e9:12.1f} {whole / parts - 1:8.2%}")
        contestant.close()
    return times


def report(times: dict[str, dict[str, list[float]]], given: argparse.Namespace) -> None:
    print(f"width {given.width}, {given.resolution} px, {given.pairs} pair(s) a step, fp32, {given.rounds} rounds")
    for kind, measured in times.items():
        print(f"{'by the ' + kind:>20} {'pairs/s':>8}")
        for name, seconds in measured.items():
            print(f"{name:>20} {given.pairs / statistics.median(seconds):8.3f}")
        print(f"{'ratio':>33} {'median':>8} {'least':>7} {'most':>7} {'bound':>7}")
        for (mine, theirs), bound in BOUNDS.items():
            ratios = [slow / fast for fast, slow in zip(measured[mine], measured[theirs], strict=True)]
            told = f"{mine} / {theirs}"
            print(f"{told:>33} {statistics.median(ratios):8.3f} {min(ratios):7.3f} {max(ratios):7.3f} {bound:7.2f}")


if __name__ == "__main__":
    main()
