"""`diffpref generate MODEL OUTPUT --prompts FILE`: images of a pipeline folder, a run's final/ or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from diffpref.cli.parsing import parse
from diffpref.errors import UserError


@dataclass(frozen=True)
class Options:
    """Images for a prompt set, with seeds tied to (seed, prompt, index)."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A pipeline folder, a hub id, or `embedded`."""
    output: Annotated[Positional[str], arg(metavar="OUTPUT")]
    """The folder to fill; what it already holds of the same set is kept."""
    prompts: str
    """A text file with one prompt a line, a dataset in the normal form, or `embedded`."""
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
    lora: tuple[str, ...] = ()
    """LoRA weights: a file, or the final/ folder of a LoRA run; several are added up."""
    lora_scales: tuple[float, ...] = ()
    """What each of them is multiplied by; 1 when not given."""
    unet: str | None = None
    """Another U-Net: a folder, or a pipeline folder or hub id that holds one."""
    negative: str | None = None
    """What guides from the other side (NPO): LoRA weights, added to the model as it is drawn from, or a pipeline."""
    merge_weight: float = 0.0
    """The share of --lora and --unet that is taken out from under --negative's LoRA weights again."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"


def main(arguments: list[str]) -> None:
    """Fill the folder and print how many images it holds."""
    options = parse(Options, arguments, "diffpref generate")
    _check(options)

    from pathlib import Path

    from diffpref.data.engine import is_main
    from diffpref.evaluate.generate import fingerprint, generate, wishes
    from diffpref.evaluate.prompts import read_prompts
    from diffpref.models.loading import best_device, load_backbone, load_negative, scheduler_config_of, weights_dtype
    from diffpref.sampling import Sampling, refuse_sampler, samplers_of
    from diffpref.train.config import ModelConfig

    prompts = read_prompts(options.prompts)[: options.limit or None]
    device = best_device()
    scheduler = scheduler_config_of(options.model)
    sampler = options.sampler or samplers_of(scheduler)[0]
    refuse_sampler(sampler, scheduler, "--sampler")
    model = ModelConfig(options.model, lora=options.lora, lora_scales=options.lora_scales, unet=options.unet)
    weights = weights_dtype(options.mixed_precision, device)
    backbone = load_backbone(model, device, weights, trainable=False)
    name, negative = fingerprint(backbone), None
    if options.negative:
        negative = load_negative(model, backbone, options.negative, options.merge_weight, weights)
        name = f"{name} against {fingerprint(negative)}"
    wanted = wishes(prompts, options.images_per_prompt, options.seed)
    how = Sampling(sampler, options.steps, options.guidance_scale)
    resolution = options.resolution or backbone.resolution
    generate(
        backbone,
        Path(options.output),
        wanted,
        how,
        resolution,
        options.batch_size,
        model=name,
        negative=negative,
        shared=True,
    )
    if is_main():
        print(f"{len(wanted)} images of {len(prompts)} prompts in {options.output}")


def _check(options: Options) -> None:
    for key in ("images_per_prompt", "steps", "batch_size"):
        if getattr(options, key) < 1:
            raise UserError(f"--{key.replace('_', '-')}: {getattr(options, key)} is not above 0")
    for key in ("limit", "resolution", "guidance_scale"):
        if not getattr(options, key) >= 0:
            raise UserError(f"--{key.replace('_', '-')}: {getattr(options, key)} is not 0 or above")
    if len(options.lora_scales) not in (0, len(options.lora)):
        raise UserError(f"--lora-scales: {len(options.lora_scales)} numbers for {len(options.lora)} of --lora")
    if not 0 <= options.merge_weight <= 1:
        raise UserError(f"--merge-weight: {options.merge_weight} is not from 0 to 1")
    if options.merge_weight and not (options.negative and (options.lora or options.unet)):
        raise UserError("--merge-weight: there is nothing to take out; it goes with --negative and --lora or --unet")
