"""Evaluate a model as a published protocol does: draw, score, and put the result beside the published figures.

Everything is a file in the output folder, so a run that was cut goes on where it stopped: `model/` and `base/` hold the
images and their scores, `result.json` and `result.md` the table.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffpref.data.dataset import split_names
from diffpref.data.engine import Running, is_main
from diffpref.data.scoring import LoadScorer
from diffpref.drawing import ModelOptions, load_drawn
from diffpref.errors import UserError
from diffpref.evaluate.generate import Wish, await_images, generate, wishes
from diffpref.evaluate.outcome import Row, markdown, row_of
from diffpref.evaluate.prompts import Prompt, read_prompts
from diffpref.evaluate.protocols import Protocol
from diffpref.evaluate.score import score
from diffpref.evaluate.targets import folder_target
from diffpref.files import write_whole
from diffpref.models.loading import scheduler_config_of
from diffpref.sampling import Sampling, refuse_sampler

log = logging.getLogger("diffpref")


@dataclass(frozen=True)
class Evaluation:
    """A protocol on a model. base: evaluated with the same prompts and seeds, for differences; none if None.

    prompts: where the protocol's prompts are. limit: only so many of them, 0 for all. resolution: 0 for the models'.
    """

    protocol: Protocol
    model: str
    base: str | None
    prompts: str | None
    split: str | None
    limit: int
    seed: int
    resolution: int
    batch_size: int
    score_batch_size: int

    def read_prompts(self) -> list[Prompt]:
        """The prompts. Raises UserError where the user has to name them and did not."""
        place = self.prompts or self.protocol.prompts
        if place is None:
            raise UserError(f"--prompts: name your copy of {self.protocol.source}")
        return read_prompts(place, self._split(Path(place)))[: self.limit or None]

    def _split(self, path: Path) -> str | None:
        """The split that is asked for, or else the first of the protocol's that a folder of parquet files has."""
        if self.split is not None or not self.protocol.splits or not path.is_dir():
            return self.split
        there = split_names(path) if any(path.rglob("*.parquet")) else []
        return next((split for split in self.protocol.splits if split in there), None)


@dataclass(frozen=True)
class Result:
    """What was found. left_out: scorers that could not be loaded, and why. told: what else is to be known, in lines."""

    rows: tuple[Row, ...]
    left_out: dict[str, str]
    told: tuple[str, ...]
    output: Path

    def summary(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        rows = [row.told() for row in self.rows]
        return {"output": str(self.output), "scorers": rows, "left_out": self.left_out, "notes": list(self.told)}


def usable(scorers: Sequence[tuple[str, LoadScorer]], skip_missing: bool) -> tuple[list[LoadScorer], dict[str, str]]:
    """The scorers that load, and of the others why they do not; each is loaded and let go, before hours of drawing.

    Raises UserError that names those that do not load, unless they are to be skipped, and where none is left.
    """
    good, missing = [], {}
    for name, load in scorers:
        try:
            load()
            good.append(load)
        except UserError as error:
            missing[name] = str(error)
    why = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    if missing and not (skip_missing and good):
        more = "none is left" if skip_missing else "--skip-missing leaves them out"
        raise UserError(f"{len(missing)} of {len(scorers)} scorers cannot be loaded ({more}): {why}")
    if missing:
        log.warning("left out: %s", why)
    return good, missing


def evaluate(
    wanted: Evaluation,
    options: ModelOptions,
    output: Path,
    scorers: Sequence[LoadScorer],
    left_out: dict[str, str],
    running: Running | None = None,
    told: Sequence[str] = (),
) -> Result | None:
    """Draw and score what is missing, and write the result. None on ranks above 0, which share the work.

    options: what is put upon the model; the base has none of it. told: further notes for the result.
    Raises UserError as the parts do, and where `output` holds images of another evaluation.
    """
    protocol = wanted.protocol
    prompts = wanted.read_prompts()
    how = Sampling(protocol.sampler, protocol.steps, protocol.guidance_scale)
    models = [("model", wanted.model, options)]
    if wanted.base is not None:
        models.append(("base", wanted.base, ModelOptions(mixed_precision=options.mixed_precision)))
    for _, model, _ in models:
        refuse_sampler(how.sampler, scheduler_config_of(model), "--sampler")
    images = wishes(prompts, protocol.images_per_prompt, wanted.seed)
    for name, model, upon in models:
        _draw(wanted, model, upon, output / name, images, how)
    targets = [folder_target(output / name) for name, _, _ in models]
    found = score(targets, scorers, wanted.score_batch_size, running)
    if not is_main():
        return None
    of_model = found[: len(scorers)]
    of_base = found[len(scorers) :] or [None] * len(scorers)
    rows = tuple(row_of(protocol, *pair) for pair in zip(of_model, of_base, strict=True))
    lines = [*_notes(wanted, options, len(prompts), rows), *told]
    lines += [f"left out: {name}: {why}" for name, why in left_out.items()]
    result = Result(rows, left_out, tuple(lines), output)
    text = json.dumps(result.summary(), indent=1, ensure_ascii=False) + "\n"
    write_whole(output / "result.json", text.encode())
    write_whole(output / "result.md", markdown(f"{protocol.name}: {wanted.model}", rows, lines).encode())
    return result


def _draw(
    wanted: Evaluation, model: str, options: ModelOptions, folder: Path, images: list[Wish], how: Sampling
) -> None:
    """The images of one model, which is let go afterwards."""
    drawn = load_drawn(model, options)
    generate(
        drawn.backbone,
        folder,
        images,
        how,
        wanted.resolution or drawn.backbone.resolution,
        wanted.batch_size,
        description=f"images of {model}",
        model=drawn.name,
        negative=drawn.negative,
        main=is_main(),
    )
    await_images(folder, images)


def _notes(wanted: Evaluation, options: ModelOptions, prompts: int, rows: Sequence[Row]) -> list[str]:
    """What the table is of, in lines."""
    protocol = wanted.protocol
    upon = [f"{key} {value}" for key, value in vars(options).items() if value not in ((), None, 0.0, "no")]
    lines = [f"model: {', '.join([wanted.model, *upon])}"]
    if wanted.base is not None:
        lines.append(f"base: {wanted.base}")
    limited = ", only the first of them" if wanted.limit else ""
    lines.append(f"{prompts} prompts{limited}, {protocol.images_per_prompt} images each, seed {wanted.seed}")
    lines.append(f"{protocol.sampler}, {protocol.steps} steps, guidance {protocol.guidance_scale:g}")
    lines += [protocol.note] if protocol.note else []
    lines += [f"published figures: {source}" for source in dict.fromkeys(row.source for row in rows) if source]
    return lines
