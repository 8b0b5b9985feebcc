"""Images for a prompt set: files plus metadata.jsonl, resumable, the same whatever the batch or the process count."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffpref.data.engine.ledger import Claims
from diffpref.data.prompts import warn_of_cut
from diffpref.draws import draw_seed
from diffpref.errors import UserError
from diffpref.evaluate.prompts import Prompt
from diffpref.progress import Bar
from diffpref.sampling import Sampling, sample, scheduler_of
from diffpref.types import Backbone


@dataclass(frozen=True)
class Wish:
    """One image to make: `index` counts the images of its prompt, `category` is the kind of prompt, if it has one."""

    file_name: str
    prompt: str
    index: int
    seed: int
    category: str | None = None

    def line(self) -> dict[str, Any]:
        """What metadata.jsonl says of it."""
        return {key: value for key, value in vars(self).items() if value is not None}


def wishes(prompts: Sequence[Prompt], images_per_prompt: int, seed: int) -> list[Wish]:
    """What to make for each prompt. An image's seed depends on (seed, prompt, index) alone.

    So two models get the same noise for the same prompt, and the place of a prompt in its file does not matter.
    """
    return [
        Wish(
            f"{place:05d}-{index}.png",
            prompt.text,
            index,
            draw_seed(seed, prompt.text, index) % 2**32,
            prompt.category,
        )
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
    model: str = "",
    negative: Backbone | None = None,
    main: bool = True,
) -> None:
    """Draw what the folder lacks of the wanted images, and write metadata.jsonl when all are there.

    model: the model's `fingerprint`, noted with the images if given. negative: what guides from the other side (NPO).
    main: False for all but one of the processes that share the images; that one stays until all are there.
    A folder that holds images of another model, other prompts, seeds or settings, raises UserError. Files are written
    beside and renamed.
    """
    settings = {"sampler": how.sampler, "steps": how.steps, "guidance_scale": how.guidance_scale}
    settings |= {"resolution": resolution} | ({"model": model} if model else {})
    lines = [{**wish.line(), **settings} for wish in wanted]
    backbone.latent_shape(resolution, resolution)  # refuses a resolution that the VAE cannot take
    try:
        if main:
            _claim(folder, lines)
        else:
            _await_claim(folder, lines)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    missing = _missing(folder, wanted)
    scheduler = scheduler_of(how.sampler, backbone.scheduler_config)
    if missing and not quiet and main:
        warn_of_cut(backbone, list(dict.fromkeys(wish.prompt for wish in wanted)))
    if not missing and not main:
        return
    claims = Claims(folder / CLAIMS)
    with Bar(description, len(wanted), "images", len(wanted) - len(missing), shown=main and not quiet) as bar:
        while missing:
            before = len(missing)
            for start in range(0, len(wanted), batch_size):
                batch = wanted[start : start + batch_size]
                with claims.claim(f"{start:x}") as mine:
                    lacking = _missing(folder, batch) if mine else []
                    if lacking:  # all of the batch is drawn, for the last bit depends on its size
                        prompts, seeds = [wish.prompt for wish in batch], [wish.seed for wish in batch]
                        latents = sample(backbone, scheduler, prompts, seeds, resolution, how, negative)
                        _save(folder, batch, to_images(backbone.decode(latents)), set(lacking))
                bar.advance(len(lacking))
                before -= len(lacking)
            if not main:
                return
            missing = _missing(folder, wanted)
            bar.advance(before - len(missing))  # what others drew
            if missing:
                time.sleep(WAIT)
    _write(folder / "metadata.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    (folder / PLAN).unlink()
    (folder / CLAIMS).unlink(missing_ok=True)


def await_images(folder: Path, wanted: list[Wish]) -> None:
    """Wait until the main rank has finished a folder that is drawn together; where it fails, torchrun ends us."""
    while (folder / PLAN).is_file() or not (folder / "metadata.jsonl").is_file() or _missing(folder, wanted):
        time.sleep(WAIT)


def _missing(folder: Path, wanted: list[Wish]) -> list[Wish]:
    return [wish for wish in wanted if not (folder / wish.file_name).is_file()]


def _save(folder: Path, batch: list[Wish], images: list[Image.Image], lacking: set[Wish]) -> None:
    for wish, image in zip(batch, images, strict=True):
        if wish not in lacking:
            continue
        part = folder / f".{wish.file_name}.part"
        image.save(part, format="PNG")
        part.rename(folder / wish.file_name)


def fingerprint(backbone: Backbone) -> str:
    """Twelve digits that name a model's weights, so that images of two models never share a folder."""
    digest = hashlib.sha256(json.dumps(backbone.identity(), sort_keys=True).encode())
    for name, value in sorted(backbone.net.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


CLAIMS = ".claims.part"  # where processes hold locks on the batches that they draw
WAIT = 0.2  # seconds between looks at what others do
PLAN = "plan.jsonl"  # what a folder is being filled with, until its metadata.jsonl says that it is full


def _claim(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Note what will fill the folder; refuse one that is being or has been filled with something else."""
    folder.mkdir(parents=True, exist_ok=True)
    plan, metadata = folder / PLAN, folder / "metadata.jsonl"
    if metadata.is_file():
        earlier = _objects(metadata)
    elif plan.is_file():
        earlier = _objects(plan)
    elif any(path.suffix != ".part" for path in folder.iterdir()):
        raise UserError(f"{folder} holds other files; choose an empty folder")
    else:
        earlier = lines
    if earlier != lines:
        what = "another model, or of other prompts, seeds or settings"
        raise UserError(f"{folder} holds images of {what}; choose another folder")
    _write(plan, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _await_claim(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Wait until the main process has noted this very work; where it refuses the folder, who started us ends us."""
    files = (folder / PLAN, folder / "metadata.jsonl")
    while not any(file.is_file() and _objects(file) == lines for file in files):
        time.sleep(WAIT)


def _objects(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise UserError(f"{file} is not one of ours: {error}") from error


def _write(file: Path, text: str) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(file)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """PIL images of pixels (n, 3, H, W) in [0, 1], rounded as diffusers rounds them."""
    arrays = (pixels.float().cpu().permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    return [Image.fromarray(array) for array in arrays]
