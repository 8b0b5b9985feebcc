"""Images for a prompt set: files plus metadata.jsonl, resumable, the same whatever the batch or the process count."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffpref.draws import draw_seed
from diffpref.errors import UserError
from diffpref.progress import Bar
from diffpref.sampling import Sampling, sample, scheduler_of
from diffpref.types import Backbone


@dataclass(frozen=True)
class Wish:
    """One image to make: `index` counts the images of its prompt."""

    file_name: str
    prompt: str
    index: int
    seed: int


def wishes(prompts: list[str], images_per_prompt: int, seed: int) -> list[Wish]:
    """What to make for each prompt. An image's seed depends on (seed, prompt, index) alone.

    So two models get the same noise for the same prompt, and the place of a prompt in its file does not matter.
    """
    return [
        Wish(f"{place:05d}-{index}.png", prompt, index, draw_seed(seed, prompt, index) % 2**32)
        for place, prompt in enumerate(prompts)
        for index in range(images_per_prompt)
    ]


def generate(
    backbone: Backbone,
    folder: Path,
    wanted: list[Wish],
    how: Sampling,
    resolution: int,
    batch_size: int,
    description: str = "images",
    quiet: bool = False,
) -> None:
    """Draw what the folder lacks of the wanted images, and write metadata.jsonl when all are there.

    A folder that holds other prompts, seeds or settings raises UserError. Files are written beside and renamed.
    """
    settings = {"sampler": how.sampler, "steps": how.steps, "guidance_scale": how.guidance_scale}
    lines = [{**vars(wish), **settings, "resolution": resolution} for wish in wanted]
    try:
        _claim(folder, lines)
    except PermissionError as error:
        raise UserError(f"no permission to write {folder}") from error
    missing = [wish for wish in wanted if not (folder / wish.file_name).is_file()]
    scheduler = scheduler_of(how.sampler, backbone.scheduler_config)
    bar = None if quiet else Bar(description, len(wanted), "images", done=len(wanted) - len(missing))
    with bar or _nothing():
        for start in range(0, len(missing), batch_size):
            group = missing[start : start + batch_size]
            prompts, seeds = [wish.prompt for wish in group], [wish.seed for wish in group]
            latents = sample(backbone, scheduler, prompts, seeds, resolution, how)
            for wish, image in zip(group, to_images(backbone.decode(latents)), strict=True):
                part = folder / f".{wish.file_name}.part"
                image.save(part, format="PNG")
                part.rename(folder / wish.file_name)
            if bar:
                bar.advance(len(group))
    metadata = folder / "metadata.jsonl.part"
    metadata.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    metadata.rename(folder / "metadata.jsonl")
    (folder / PLAN).unlink()


PLAN = "plan.json"  # what a folder is being filled with, until its metadata.jsonl says that it is full


def _claim(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Note what will fill the folder; refuse one that is being or has been filled with something else."""
    folder.mkdir(parents=True, exist_ok=True)
    plan, metadata = folder / PLAN, folder / "metadata.jsonl"
    if metadata.is_file():
        earlier = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
    elif plan.is_file():
        earlier = json.loads(plan.read_text(encoding="utf-8"))
    elif any(folder.iterdir()):
        raise UserError(f"{folder} holds other files; choose an empty folder")
    else:
        earlier = lines
    if earlier != lines:
        raise UserError(f"{folder} holds images of other prompts, seeds or settings; choose another folder")
    plan.write_text(json.dumps(lines, ensure_ascii=False), encoding="utf-8")


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """PIL images of pixels (n, 3, H, W) in [0, 1], rounded as diffusers rounds them."""
    arrays = (pixels.float().cpu().permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    return [Image.fromarray(array) for array in arrays]


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()
