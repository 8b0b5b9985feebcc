"""What is looked at during training: held-out preferences and images of a few prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from diffpref.data.loader import Loader
from diffpref.evaluate.generate import generate, wishes
from diffpref.evaluate.prompts import read_prompts
from diffpref.objectives import Objective
from diffpref.sampling import Sampling
from diffpref.scorers.base import load_scorer
from diffpref.train.config import ValidationConfig
from diffpref.train.placing import Placer, Stateless
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
    still = replace(loader, seed=validation.seed, data=replace(loader.data, flip=False, prompt_dropout=0.0))
    count = min(len(loader), validation.pairs)
    seen = []
    for places in still.batches(count, BATCH):
        at = place(still.batch(places))
        predicted = backbone.predict(at.x_t, at.t, at.cond)
        known = reference(at.x_t, at.t, at.cond) if reference else None
        seen.append(Outputs(predicted, at.target, known, at.label, at.weight))
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


def sample_images(backbone: Backbone, folder: Path, validation: ValidationConfig, resolution: int) -> dict[str, float]:
    """Draw images of the first prompts of the validation set, always from the same noise; their mean score if asked."""
    if validation.prompts is None or not validation.images:
        return {}
    prompts = read_prompts(validation.prompts)
    step = max(1, len(prompts) // max(validation.images, 1))
    wanted = wishes(prompts[::step][: validation.images], 1, validation.seed)
    how = Sampling(validation.sampler, validation.num_inference_steps, validation.guidance_scale)
    generate(backbone, folder, wanted, how, resolution, batch_size=8, quiet=True)
    if validation.scorer is None:
        return {}
    from diffpref.evaluate.score import scores_of

    return {"validation_score": scores_of(folder, load_scorer(validation.scorer)).summary().mean}
