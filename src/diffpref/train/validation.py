"""What is looked at during training: held-out preferences and images of a few prompts."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diffpref.data.loader import Loader
from diffpref.evaluate.generate import generate, wishes
from diffpref.evaluate.prompts import read_prompts
from diffpref.objectives import Objective
from diffpref.sampling import Sampling
from diffpref.train.config import ValidationConfig
from diffpref.train.placing import Placer, Stateless
from diffpref.train.run_folder import SCORE
from diffpref.types import Backbone, Outputs, Predict

BATCH = 16


@torch.no_grad()
def heldout_metrics(
    backbone: Backbone,
    reference: Predict | None,
    objective: Objective,
    place: Placer,
    loader: Loader,
    validation: ValidationConfig,
) -> dict[str, float]:
    """Loss and implicit accuracy on held-out items; each item's time and noise are always the same.

    Points with a state would be disturbed: for these it is the denoising error on the held-out images instead.
    """
    if not isinstance(place, Stateless):
        from diffpref.objectives import SFT
        from diffpref.points import Independent

        objective, reference = SFT(), None
        place = Stateless(lambda batch: Independent()(batch, backbone.schedule))
        loader = replace(loader, items="liked")
    still, places = looked_at(loader, validation)
    seen = []
    for some in still.batches(places, BATCH):
        batch = still.batch(some)
        at = place(batch)
        predicted = backbone.predict(at.x_t, at.t, at.cond)
        known = reference(at.x_t, at.t, at.cond) if reference else None
        outputs = Outputs(predicted, at.target, known, at.label, at.weight, known_error=batch.known_error)
        seen.append(outputs)
    if objective.needs_mean_gain:
        mean = torch.cat([outputs.gain() for outputs in seen]).mean()
        seen = [replace(outputs, mean_gain=mean) for outputs in seen]
    losses, hits = [], []
    for outputs in seen:
        loss, metrics = objective(outputs)
        losses.append(loss)
        hits.append(metrics.get("implicit_accuracy", loss[:0]))
    found = {"heldout_loss": torch.cat(losses).mean().item()}
    if len(accuracy := torch.cat(hits)):
        found["heldout_accuracy"] = accuracy.double().mean().item()
    return found


def looked_at(heldout: Loader, validation: ValidationConfig) -> tuple[Loader, range]:
    """The loader of held-out items without chance, and which of its places are looked at."""
    still = replace(heldout, seed=validation.seed, data=replace(heldout.data, flip=False, prompt_dropout=0.0))
    return still, range(min(len(heldout), validation.pairs))


def sample_images(
    backbone: Backbone, folder: Path, validation: ValidationConfig, resolution: int, device: torch.device
) -> dict[str, float]:
    """Draw images of a few prompts of the validation set, always from the same noise; their mean scores if asked.

    `validation_score` is the first scorer's mean, `validation_score_NAME` that of each. Scorers are loaded for this and
    let go afterwards, so that training has their memory.
    """
    if validation.prompts is None or not validation.images:
        return {}
    prompts = read_prompts(validation.prompts)
    step = max(1, len(prompts) // max(validation.images, 1))
    wanted = wishes(prompts[::step][: validation.images], 1, validation.seed)
    how = Sampling(validation.sampler, validation.num_inference_steps, validation.guidance_scale)
    generate(backbone, folder, wanted, how, resolution, batch_size=8, quiet=True)
    if validation.scorer is None:
        return {}
    from diffpref.data.engine import Running
    from diffpref.data.scoring import scorers_named
    from diffpref.evaluate.score import score
    from diffpref.evaluate.targets import folder_target

    scorers = scorers_named(validation.scorer, str(device))
    found = score([folder_target(folder)], scorers, running=Running(shown=False), overwrite=True)
    means = {scores.scorer: scores.summary().mean for scores in found}
    known = {f"{SCORE}_{name}": mean for name, mean in means.items() if mean is not None}
    first = means[found[0].scorer]
    return ({} if first is None else {SCORE: first}) | known


def first_scorer(found: dict[str, float]) -> str | None:
    """The scorer whose mean is `validation_score`, and decides which checkpoint is the best."""
    names = [key.removeprefix(f"{SCORE}_") for key in found if key.startswith(f"{SCORE}_")]
    return names[0] if SCORE in found else None


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn within from the generators of Python, NumPy and torch, they go on outside as if it were not."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
