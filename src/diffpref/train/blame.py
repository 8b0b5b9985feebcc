"""Whose gradient is not finite although every loss is: the items of a step one by one. Slow, and rare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object

from diffpref.types import Points

if TYPE_CHECKING:
    from diffpref.train.step import Learner, Look

ONE_BY_ONE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def gradient_offenders(learner: Learner, looks: Sequence[Look], optimizer: Any) -> list[str]:
    """The names of the items, of all processes, that alone give a gradient which is not finite.

    Every process must call it. The gradients are zeroed. Where networks are sharded nobody is named: there a gradient
    is whole only after all processes' parts are summed.
    """
    if learner.accelerator.distributed_type not in ONE_BY_ONE:
        return []
    found = []
    for look in looks:
        for item, name in enumerate(look.names):
            optimizer.zero_grad()
            with learner.accelerator.no_sync(learner.policy.net):
                alone = one_item(look, item)
                zero = alone.points.x_t.new_zeros(()) if learner.objective.needs_mean_gain else None
                learner.descend(alone, zero)
            gradients = [value.grad for value in learner.policy.net.parameters() if value.grad is not None]
            if not torch.nn.utils.get_total_norm(gradients).isfinite():
                found.append(name)
    optimizer.zero_grad()
    gathered: Any = gather_object(found)
    return list(gathered)


def one_item(look: Look, item: int) -> Look:
    """One item of a look: its row, or its two rows."""
    points, items = look.points, len(look.points.label)
    rows = list(range(item, len(points.x_t), items))
    alone = Points(
        x_t=points.x_t[rows],
        t=points.t[rows],
        target=points.target[rows],
        cond={name: value[rows] for name, value in points.cond.items()},
        label=points.label[[item]],
        weight=points.weight[[item]],
        scale=None if points.scale is None else points.scale[rows],
    )
    known, errors = look.known, look.known_error
    return replace(
        look,
        names=(look.names[item],),
        points=alone,
        known=None if known is None else known[rows],
        known_error=None if errors is None else errors[rows],
    )
