"""Makers of generated folders and of a run folder, as `diffpref generate` and `diffpref train` write them."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from diffpref.embedded import world


@dataclass(frozen=True)
class Brightness:
    """A scorer that any image and prompt will do for; it notes the size of each batch."""

    name: str = "brightness"
    version: str = "1"
    batches: list[int] = field(default_factory=list)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        self.batches.append(len(images))
        return [float(np.asarray(image).mean()) / 255 for image in images]


def make_folder(folder: Path, clutter: float = 0.0, prompts: int = 4, per_prompt: int = 1, seed: int = 0) -> Path:
    """A generated folder of painted compositions; the same `seed` gives the same prompts, in which folder ever."""
    rng = np.random.default_rng(seed)
    known = world.compositions()
    rows = []
    folder.mkdir(parents=True)
    for place in rng.permutation(len(known))[:prompts]:
        for index in range(per_prompt):
            shown = world.miscaptioned(known[place], clutter / 2, rng)
            name = f"{place:05d}-{index}.png"
            Image.fromarray(world.paint(shown, rng, clutter)).save(folder / name)
            caption = known[place].caption()
            rows.append({"file_name": name, "prompt": caption, "index": index, "seed": 100 + int(place) + index})
    write_rows(folder, rows)
    return folder


def read_rows(folder: Path) -> list[dict]:
    """The objects of a folder's metadata.jsonl."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def write_rows(folder: Path, rows: list[dict]) -> None:
    """Write a folder's metadata.jsonl."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, steps: int = 200) -> Path:
    """A run folder with plausible metrics, a configuration and validation samples at two steps."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, steps + 1):
        gain = 1 - math.exp(-step / (steps / 3))
        rejected, chosen = 0.052 + 0.004 * gain + rng.normal(0, 0.002), 0.05 + rng.normal(0, 0.002)
        row = {
            "step": step,
            "pairs_seen": 16 * step,
            "loss": math.log(2) - 0.09 * gain + rng.normal(0, 0.03) * gain,
            "lr": 1e-5,
            "grad_norm": 0.5 + 0.2 * gain + abs(rng.normal(0, 0.2)),
            "implicit_accuracy": float(np.clip(0.5 + 0.18 * gain + rng.normal(0, 0.09), 0, 1)),
            "reward_margin": 0.3 * gain + rng.normal(0, 0.06) * gain,
            "policy_error_chosen": chosen,
            "policy_error_rejected": rejected,
            "reference_error": 0.051 + rng.normal(0, 0.002),
            "pairs_per_second": 61 + rng.normal(0, 3),
        }
        rows.append(row)
        if step % max(1, steps // 8) == 0:
            rows.append({"step": step, "heldout_accuracy": 0.5 + 0.12 * gain, "heldout_loss": 0.69 - 0.05 * gain})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        "output_dir: runs/demo\nmodel:\n  pretrained: embedded\n  lora_rank: 0\nobjective:\n  name: dpo\n"
        f"  beta: 2000.0\ntrain:\n  max_steps: {steps}\n  batch_size: 16\n  learning_rate: 1.0e-05\n  seed: 0\n"
    )
    (folder / "environment.json").write_text(json.dumps({"torch": "2.9.0", "python": "3.11"}, indent=2))
    make_folder(folder / "samples" / "step-2", clutter=0.8, prompts=6)
    make_folder(folder / "samples" / f"step-{steps}", clutter=0.3, prompts=6)
    return folder
