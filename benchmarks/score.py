"""Five scorers over a folder of images in one pass, against five passes that each decode and preprocess alone.

The scorers are CLIP models of random weights with the published preprocessings: the shorter side to 224 and the middle
square for two of them and, cut otherwise, for a third; the whole image on a black square for two. Both ways are
`diffpref score` itself: the same threads that decode ahead, the same ledger, fresh in every round. The images are
shared out to the rounds, in which the two ways take turns; printed are the medians of the rounds and of their ratios,
by the clock and by the processor's time, which other programs on the machine disturb less.
On a GPU also: images a second of a network of PickScore's true size, and the share of time in which it waits.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import CLIPConfig, CLIPModel

from diffpref.data.engine import Running
from diffpref.evaluate.score import score
from diffpref.evaluate.targets import folder_target
from diffpref.scorers.base import Prepare, Reward

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.generated import write_rows

SIDE = 224
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276)))
WIDTHS = {"tiny": (128, 2, 32), "small": (384, 6, 32), "huge": (1280, 32, 14)}  # width, layers, patch


@dataclass(frozen=True)
class Square:
    """The shorter side to 224 by PIL, then the middle square; `cut` tells what becomes of half a pixel."""

    cut: Literal["floor", "even"]

    def __call__(self, image: Image.Image) -> Tensor:
        scale = SIDE / min(image.size)
        wide, high = (max(SIDE, int(side * scale)) for side in image.size)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = ((rest // 2 if self.cut == "floor" else round(rest / 2)) for rest in (wide - SIDE, high - SIDE))
        return _normal(image.crop((left, top, left + SIDE, top + SIDE)))


@dataclass(frozen=True)
class Padded:
    """The longer side to 224 by torch, with antialiasing, on a black square."""

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        scale = SIDE / max(image.size)
        high, wide = (max(1, round(side * scale)) for side in pixels.shape[1:])
        pixels = interpolate(pixels[None], (high, wide), mode="bicubic", antialias=True)[0]
        left, top = (SIDE - wide) // 2, (SIDE - high) // 2
        return (pad(pixels, (left, SIDE - wide - left, top, SIDE - high - top)) - MEAN) / STD


def _normal(image: Image.Image) -> Tensor:
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255) - MEAN) / STD


PREPARES: tuple[tuple[str, Prepare], ...] = (
    ("pickscore", Square("floor")),
    ("aesthetic", Square("floor")),
    ("imagereward", Square("even")),
    ("hps", Padded()),
    ("clip-h", Padded()),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=10, help="that share the images")
    parser.add_argument("--side", type=int, default=512, help="of the images")
    parser.add_argument("--network", choices=WIDTHS, default="tiny")
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rewards = [reward(name, prepare, given.network, device) for name, prepare in PREPARES]
    with tempfile.TemporaryDirectory() as place:
        folders = [
            make_folder(Path(place) / f"{n}", given.images // given.rounds, given.side, n) for n in range(given.rounds)
        ]
        compare(folders, rewards, given.batch)
        if device == "cuda":
            waiting(folders, reward("pickscore", Square("floor"), "huge", device, torch.float16), given.batch)


def reward(name: str, prepare: Prepare, network: str, device: str, dtype: torch.dtype = torch.float32) -> Reward:
    """A CLIP model of random weights: the cosine of image and prompt."""
    width, layers, patch = WIDTHS[network]
    torch.manual_seed(0)
    vision = {"hidden_size": width, "num_hidden_layers": layers, "patch_size": patch, "image_size": SIDE}
    vision |= {"intermediate_size": 4 * width, "num_attention_heads": width // 64}
    text = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 512, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)).to(device, dtype).eval()

    @torch.inference_mode()
    def measure(images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        tokens = torch.tensor([[49406, *map(ord, prompt[:8].ljust(8)), 49407] for prompt in prompts], device=device)
        pixels = torch.stack(list(images)).to(device, dtype)
        out = model(input_ids=tokens, pixel_values=pixels)
        return torch.cosine_similarity(out.image_embeds.float(), out.text_embeds.float()).cpu()

    return Reward(name, {"network": network}, prepare, measure)


def make_folder(folder: Path, count: int, side: int, seed: int) -> Path:
    """Images of smooth noise as PNG, as `generate` writes them, half of them not square."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), []
    for place in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        size = (side, side * 3 // 4) if place % 2 else (side, side)
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{place}.png", compress_level=1)
        rows.append({"file_name": f"{place}.png", "prompt": f"prompt {place}", "index": 0, "seed": place})
    write_rows(folder, rows)
    return folder


def compare(folders: list[Path], rewards: list[Reward], batch: int) -> None:
    """Print images a second of both ways and their ratio."""
    one: list[tuple[float, float]] = []
    five: list[tuple[float, float]] = []
    for number, folder in enumerate(folders):
        ways = [
            (one, partial(run, folder, [rewards], batch)),
            (five, partial(run, folder, [[r] for r in rewards], batch)),
        ]
        for rates, way in ways if number % 2 else ways[::-1]:
            rates.append(way())
        print(f"round {number + 1}: {one[-1][0]:.1f} and {five[-1][0]:.1f} images/s", file=sys.stderr, flush=True)
    for place, kind in enumerate(("by the clock", "by processor's time")):
        of_one, of_five = ([rates[place] for rates in way] for way in (one, five))
        ratios = [a / b for a, b in zip(of_one, of_five, strict=True)]
        print(f"{kind}: one pass of {len(rewards)} scorers {statistics.median(of_one):.1f} images/s")
        print(f"{kind}: {len(rewards)} passes of one {statistics.median(of_five):.1f} images/s")
        print(f"{kind}: ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


def run(folder: Path, passes: list[list[Reward]], batch: int) -> tuple[float, float]:
    """Images a second over all passes, each with a ledger of its own: by the clock, and by the processor's time."""
    target = folder_target(folder)
    started, spent = time.perf_counter(), time.process_time()
    for rewards in passes:
        with tempfile.TemporaryDirectory() as ledger:
            alone: Any = folder_target(folder, Path(ledger))
            loads: list[Callable[[], Reward]] = [lambda each=each: each for each in rewards]
            score([alone], loads, batch, Running(shown=False), overwrite=True)
    count = len(target.prompts)
    return count / (time.perf_counter() - started), count / (time.process_time() - spent)


def waiting(folders: list[Path], huge: Reward, batch: int) -> None:
    """Print images a second of a network of PickScore's size, and the share of time in which it waits for images."""
    busy, rates = [], []
    for folder in folders:
        spent = 0.0

        def measure(images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
            nonlocal spent
            started = time.perf_counter()
            scores = huge.measure(images, prompts)
            spent += time.perf_counter() - started
            return scores

        started = time.perf_counter()
        rates.append(run(folder, [[Reward(huge.name, huge.identity, huge.prepare, measure)]], batch)[0])
        busy.append(spent / (time.perf_counter() - started))
    print(f"ViT-H/14, fp16          {statistics.median(rates):.1f} images/s, waiting {1 - statistics.median(busy):.1%}")


if __name__ == "__main__":
    main()
