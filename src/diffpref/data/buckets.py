"""Shapes that images are trained at: the square, or a table of shapes of about as many pixels.

The rule is that of the trainers people know (NovelAI's buckets, kohya's sd-scripts): sides are multiples of a step, and
no shape has more pixels than the square, so that none takes more memory. Importing this imports no numpy.
"""

from __future__ import annotations

import math

from diffpref.errors import UserError
from diffpref.train.config import DataConfig

Size = tuple[int, int]  # width and height in pixels


def bucket_table(resolution: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """All buckets, the square first and then ever longer ones, each lying before it stands.

    For every short side below the resolution, the long side is the largest multiple of the step that keeps the area
    within the square's; the table ends where one side is over `max_aspect` times the other.
    """
    sizes = [(resolution, resolution)]
    for short in range(resolution - step, 0, -step):
        long = resolution**2 // short // step * step
        if long > max_aspect * short:
            break
        sizes += [(long, short), (short, long)]
    return tuple(sizes)


def bucket_sizes(data: DataConfig) -> tuple[Size, ...]:
    """The buckets of a configuration, one square without `data.buckets`. Raises UserError for keys that cannot work."""
    if not data.buckets:
        return ((data.resolution, data.resolution),)
    if data.bucket_step < 1:
        raise UserError(f"data.bucket_step: {data.bucket_step} is not above 0")
    if not 1 <= data.bucket_max_aspect < math.inf:
        raise UserError(f"data.bucket_max_aspect: {data.bucket_max_aspect} is not a finite number from 1 on")
    if data.resolution % data.bucket_step:
        raise UserError(f"data.bucket_step: the resolution of {data.resolution} is no multiple of {data.bucket_step}")
    return bucket_table(data.resolution, data.bucket_step, data.bucket_max_aspect)
