"""`diffpref evaluate PROTOCOL MODEL [OUTPUT]`: a published evaluation, beside the published figures."""

from __future__ import annotations

import json as json_format
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from diffpref.cli.parsing import parse
from diffpref.cli.tables import aligned
from diffpref.drawing import ModelOptions
from diffpref.errors import UserError
from diffpref.evaluate.protocols import protocol


@dataclass(frozen=True)
class Evaluate:
    """Draw images as a published evaluation does, score them, and put the means beside the published ones.

    Protocols: pickapic-test, pickapic-validation, hpdv2, partiprompts, embedded. The same command again goes on where
    it was cut. Several GPUs: torchrun -m diffpref evaluate ..., or accelerate launch -m diffpref evaluate ...
    """

    name: Annotated[Positional[str], arg(metavar="PROTOCOL")]
    """The published evaluation."""
    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A pipeline folder, a hub id, or `embedded`."""
    output: Annotated[Positional[str], arg(metavar="OUTPUT")] = ""
    """The folder for images, scores and the table; runs/PROTOCOL/MODEL when not given."""
    prompts: str | None = None
    """Your copy of the protocol's prompts, in any form that `generate --prompts` reads."""
    split: str | None = None
    """The split of a copy in parquet; the protocol's when not given."""
    base: str | None = None
    """Evaluate this model too, with the same prompts and seeds, for differences."""
    scorer: str | None = None
    """Other reward models than the protocol's, with commas between them; NAME=WEIGHTS takes weights of one's own."""
    skip_missing: Annotated[bool, FlagCreatePairsOff] = False
    """Leave out reward models whose weights are missing."""
    limit: int = 0
    """Only the first so many prompts; 0 takes all."""
    seed: int = 0
    sampler: Literal["ddpm", "ddim", "dpmsolver++", "euler", "flow"] | None = None
    """Another sampler than the protocol's; the result tells so, as of the following."""
    steps: int | None = None
    guidance_scale: float | None = None
    images_per_prompt: int | None = None
    resolution: int = 0
    """Side in pixels; 0 takes the model's own."""
    batch_size: int = 8
    """Images drawn at once."""
    score_batch_size: int = 64
    """Images scored at once."""
    device: str = "auto"
    """Where the reward models run: `auto` takes the GPU if there is one."""
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the reward models' weights, each its own when not given; scores are always fp32."""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """Print the result as one JSON object."""
    on: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)


CHANGES = ("sampler", "steps", "guidance_scale", "images_per_prompt")


def main(arguments: list[str]) -> None:
    """Run the command."""
    options = parse(Evaluate, arguments, "diffpref evaluate")
    published = protocol(options.name)
    _check(options)
    changes = {key: value for key in CHANGES if (value := getattr(options, key)) is not None}
    changes = {key: value for key, value in changes.items() if value != getattr(published, key)}
    wanted = replace(published, **changes)
    told = [f"other than the protocol: {key} {value}, not {getattr(published, key)}" for key, value in changes.items()]
    output = Path(options.output or f"runs/{options.name}/{_slug(options.model)}")

    import torch

    from diffpref.data.scoring import names_of, scorers_named
    from diffpref.evaluate.outcome import LEGEND, cells
    from diffpref.evaluation import Evaluation, evaluate, usable

    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    names = names_of(options.scorer) if options.scorer else list(wanted.scorers)
    evaluation = Evaluation(
        wanted,
        options.model,
        options.base,
        options.prompts,
        options.split,
        options.limit,
        options.seed,
        options.resolution,
        options.batch_size,
        options.score_batch_size,
    )
    evaluation.read_prompts()  # what the user has to name is refused before weights are loaded
    loads = [(name, scorers_named(name, device, options.precision)[0]) for name in names]
    scorers, missing = usable(loads, options.skip_missing)
    result = evaluate(evaluation, options.on, output, scorers, missing, told=told)
    if result is None:
        return
    if options.json:
        print(json_format.dumps(result.summary(), indent=1, ensure_ascii=False))
        return
    print(aligned(cells(result.rows), texts=1))
    print(f"\n{LEGEND}")
    for line in (*result.told, f"result: {output / 'result.md'}"):
        print(line)


def _check(options: Evaluate) -> None:
    for key in ("steps", "images_per_prompt", "batch_size", "score_batch_size"):
        if (value := getattr(options, key)) is not None and value < 1:
            raise UserError(f"--{key.replace('_', '-')}: {value} is not above 0")
    for key in ("limit", "resolution", "guidance_scale"):
        if (value := getattr(options, key)) is not None and not value >= 0:
            raise UserError(f"--{key.replace('_', '-')}: {value} is not 0 or above")
    options.on.check()


def _slug(model: str) -> str:
    """A folder's name for a model: of a path its last two parts, so that two runs' final/ are two folders."""
    return re.sub(r"[^\w.-]+", "-", "-".join(Path(model).parts[-2:])).strip("-") or "model"
