"""`objective.beta: auto`: a beta from the errors of the first batch, so that it means the same on any model.

With the margin beta/2 * ((R_w - L_w) - (R_l - L_l)), a policy whose error lies `DRIFT` below the reference's for the
chosen image and `DRIFT` above it for the rejected one has a margin of beta * DRIFT * R. Auto makes that margin 1 for
the mean R of the first effective batch: beta = 1 / (DRIFT * R). The published 5000 of SD1.5 is a drift of about 0.15%
if the mean error of its noise prediction is 0.13.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffpref.errors import RunError
from diffpref.objectives import Objective
from diffpref.points import Independent, Paired
from diffpref.train.step import Learner
from diffpref.types import Batch

log = logging.getLogger("diffpref")
DRIFT = 0.002


def wants_calibration(objective: Objective) -> bool:
    """Whether the objective's beta is still `auto`."""
    return getattr(objective, "beta", None) == "auto"


def calibrated_objective(learner: Learner) -> Objective:
    """The learner's objective with a number for its beta, from the reference's errors on the items of the first step.

    Raises RunError where these errors are not finite.
    """
    batches = [learner.data.loader.batch(learner.places(0, micro)) for micro in range(learner.micros)]
    errors = [_error(learner, batch) for batch in batches]
    mean: Any = learner.accelerator.reduce(torch.stack(errors).mean(), reduction="mean")
    if not 0 < mean.item() < float("inf"):
        raise RunError(f"objective.beta: auto found a reference error of {mean.item()} in the first batch")
    beta = 1 / (DRIFT * mean.item())
    log.info("objective.beta: auto is %.4g, with a mean reference error of %.4g", beta, mean.item())
    return with_beta(learner.objective, beta)


def _error(learner: Learner, batch: Batch) -> Tensor:
    """The reference's mean error on a batch, (): the one that is kept, or found now. Raises ValueError for neither."""
    if batch.known_error is not None:
        return batch.known_error.mean()
    if learner.reference is None:
        raise ValueError("a beta on a reference's scale needs a reference")
    place = Paired() if learner.data.loader.items == "pairs" else Independent()
    points = place(batch, learner.policy.schedule)
    with learner.accelerator.autocast():
        known = learner.reference(points.x_t, points.t, points.cond)
    return (known.float() - points.target.float()).square().mean()


def with_beta(objective: Objective, beta: float) -> Objective:
    """The objective with this beta."""
    known: Any = objective  # one with a beta, which not every kind has
    return replace(known, beta=beta)
