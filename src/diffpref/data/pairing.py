"""Which pairs a ranked group of images gives."""

import math
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Literal

Pairing = Literal["all", "best-worst", "adjacent"]


def pairs_of(scores: Sequence[float], how: Pairing, min_margin: float = 0.0) -> list[tuple[int, int, float]]:
    """The pairs of a group as (index of the winner, index of the loser, margin), higher scores being better.

    `all` takes every two images; `best-worst` the highest and the lowest score; `adjacent` each image and the next
    lower one in the order of scores. Equal scores are a tie, which is no pair; neither is one whose margin (the
    difference of the scores) lies below `min_margin`. A score that is not finite takes no part. Among equal scores the
    earlier image stands first. Pairs come in the order of scores, highest winner first.
    """
    order = sorted((index for index in range(len(scores)) if math.isfinite(scores[index])), key=lambda i: -scores[i])
    if how == "all":
        chosen = combinations(order, 2)
    elif how == "adjacent":
        chosen = pairwise(order)
    else:
        chosen = [(order[0], order[-1])] if len(order) > 1 else []
    pairs = [(winner, loser, float(scores[winner] - scores[loser])) for winner, loser in chosen]
    return [pair for pair in pairs if pair[2] > 0 and pair[2] >= min_margin]
