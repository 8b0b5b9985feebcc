"""`diffpref generate MODEL OUTPUT --prompts FILE`: images of a pipeline folder, a run's final/ or a hub id."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from diffpref.cli.parsing import parse
from diffpref.drawing import ModelOptions, load_drawn
from diffpref.errors import UserError


@dataclass(frozen=True)
class Options:
    """Images for a prompt set, with seeds tied to (seed, prompt, index)."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A pipeline folder, a hub id, or `embedded`."""
    output: Annotated[Positional[str], arg(metavar="OUTPUT")]
    """The folder to fill; what it already holds of the same set is kept."""
    prompts: str
    """A text file with one prompt a line, a .json array, HPDv2's folder of STYLE.json, PartiPrompts.tsv, Pick-a-Pic or
    a dataset in the normal form (parquet), or `embedded`."""
    split: str | None = None
    """The split of a dataset or of Pick-a-Pic; `train`, or the only one, when not given."""
    limit: int = 0
    """Only the first so many prompts; 0 takes all."""
    images_per_prompt: int = 1
    seed: int = 0
    sampler: Literal["ddpm", "ddim", "dpmsolver++", "euler", "flow"] | None = None
    """`flow` for SD3, FLUX and Qwen-Image, which have no other, and `ddim` for the rest when not given."""
    steps: int = 50
    guidance_scale: float = 7.5
    resolution: int = 0
    """Side in pixels; 0 takes the model's own."""
    batch_size: int = 8
    workers: int = 1
    """Processes that draw, on this machine, each on a GPU of its own; or torchrun -m diffpref generate ..."""
    engine: Literal["local", "ray"] = "local"
    """`ray` draws on a Ray cluster whose machines all see the model, the prompts and the output."""
    on: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)


def main(arguments: list[str]) -> None:
    """Fill the folder and print how many images it holds."""
    options = parse(Options, arguments, "diffpref generate")
    _check(options)

    from functools import partial

    from diffpref.cli.data_make import running_of
    from diffpref.data.engine import together

    if told := together(partial(_draw, options), running_of(options.workers, options.engine)):
        print(told)


def _draw(options: Options, main: bool) -> str:
    """Fill the folder, with others that are at it; how many images it holds."""
    from pathlib import Path

    from diffpref.evaluate.generate import generate, wishes
    from diffpref.evaluate.prompts import read_prompts
    from diffpref.models.loading import scheduler_config_of
    from diffpref.sampling import Sampling, refuse_sampler, samplers_of

    prompts = read_prompts(options.prompts, options.split)[: options.limit or None]
    scheduler = scheduler_config_of(options.model)
    sampler = options.sampler or samplers_of(scheduler)[0]
    refuse_sampler(sampler, scheduler, "--sampler")
    model = load_drawn(options.model, options.on)
    wanted = wishes(prompts, options.images_per_prompt, options.seed)
    generate(
        model.backbone,
        Path(options.output),
        wanted,
        Sampling(sampler, options.steps, options.guidance_scale),
        options.resolution or model.backbone.resolution,
        options.batch_size,
        model=model.name,
        negative=model.negative,
        main=main,
    )
    return f"{len(wanted)} images of {len(prompts)} prompts in {options.output}"


def _check(options: Options) -> None:
    for key in ("images_per_prompt", "steps", "batch_size"):
        if getattr(options, key) < 1:
            raise UserError(f"--{key.replace('_', '-')}: {getattr(options, key)} is not above 0")
    for key in ("limit", "resolution", "guidance_scale"):
        if not getattr(options, key) >= 0:
            raise UserError(f"--{key.replace('_', '-')}: {getattr(options, key)} is not 0 or above")
    options.on.check()
