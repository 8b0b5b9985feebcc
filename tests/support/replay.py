"""What tests of the replay buffer share: batches that are functions of their draws, and items compared."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from support.tiny import PROMPTS, load
from torch import Tensor

from diffpref.models.sd import StableDiffusion
from diffpref.points import Replay
from diffpref.types import Batch, Points

SHORT = Replay(steps=4)  # otherwise as published
KEEPING = replace(SHORT, trajectories=3, refresh_steps=2, policy_copy_steps=2)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # a forward of another batch size rounds otherwise, step after step


def batch(backbone: StableDiffusion, draws: range, pairs: bool = False) -> Batch:
    """An item for each draw, its image and prompt functions of the draw."""
    copies = 2 if pairs else 1
    seeds = [7 * draw + half for half in range(copies) for draw in draws]
    latents = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    known = _prompts(str(backbone.pipeline))
    cond = {"text": known[[draw % 3 for draw in draws] * copies]}
    weight = torch.tensor([1.0 + draw % 5 for draw in draws])
    return Batch(latents, cond, torch.full((len(draws),), 0.75), weight, tuple(map(str, draws)), tuple(draws))


@cache
def _prompts(pipeline: str) -> Tensor:
    return load(Path(pipeline)).encode_prompts(PROMPTS)["text"]


def item(points: Points, i: int) -> list[Tensor]:
    """All that is said of one item."""
    items = len(points.label)
    rows = [i, i + items]
    cond, label = points.cond["text"][rows], points.label[[i]]
    return [points.x_t[rows], points.t[rows], points.target[rows], cond, label, points.weight[[i]]]


def assert_same(found: list[Tensor], expected: list[Tensor], exactly: bool = False) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **({"rtol": 0, "atol": 0} if exactly else CLOSE))
