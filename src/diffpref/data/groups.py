"""Turn a ranked group of images into pairs, with a reason for each pair that it does not give."""

import math
from collections.abc import Sequence
from dataclasses import replace

from diffpref.data.pairing import Pairing, pairs_of
from diffpref.data.schema import Dropped, Found, Group, ImageRow, PairRow


def pairs_from(group: Group, how: Pairing, min_margin: float) -> list[Found | Dropped]:
    """The group's pairs, and for every pair of `how` that is a tie or closer than `min_margin` a dropped row."""
    ordered = pairs_of(group.scores, how)
    wide = [pair for pair in ordered if pair[2] >= min_margin]
    count = sum(map(math.isfinite, group.scores))
    candidates = {"all": count * (count - 1) // 2, "adjacent": max(count - 1, 0), "best-worst": int(count > 1)}[how]
    if not candidates:
        return [Dropped(group.file, group.row, "single_image", bad=False)]
    rows: list[Found | Dropped] = [
        Found(group.file, group.row, _pair(group, *pair), _agreement(group.ballots, *pair[:2])) for pair in wide
    ]
    rows += [Dropped(group.file, group.row, "tie", bad=False)] * (candidates - len(ordered))
    return rows + [Dropped(group.file, group.row, "low_margin", bad=False)] * (len(ordered) - len(wide))


def as_images(found: Found) -> list[Found]:
    """A pair's two images on their own, without what anybody thought of them, in the order of the source."""
    pair = found.record
    assert isinstance(pair, PairRow)
    images = [
        ImageRow(
            id=f"{pair.id}-{number}",
            prompt=pair.prompt,
            image=getattr(pair, side),
            image_id=getattr(pair, f"{side}_id"),
            image_model=getattr(pair, f"{side}_model"),
            source=pair.source,
            group_id=pair.group_id,
        )
        for number, side in enumerate(("rejected", "chosen") if found.turned else ("chosen", "rejected"))
    ]
    return [replace(found, record=image) for image in images]


def _pair(group: Group, winner: int, loser: int, margin: float) -> PairRow:
    return PairRow(
        id=f"{group.id}-{winner}-{loser}",
        prompt=group.prompt,
        chosen=group.images[winner],
        rejected=group.images[loser],
        margin=margin,
        chosen_id=_at(group.names, winner),
        rejected_id=_at(group.names, loser),
        chosen_model=_at(group.models, winner),
        rejected_model=_at(group.models, loser),
        source=group.source,
        group_id=group.id,
    )


def _at(values: Sequence[str | None], index: int) -> str | None:
    return values[index] if values else None


def _agreement(ballots: Sequence[Sequence[float]], winner: int, loser: int) -> float | None:
    """The share of annotators who put the winner above the loser; one who calls it a tie counts half."""
    if not ballots:
        return None
    votes = [1.0 if each[winner] > each[loser] else 0.5 if each[winner] == each[loser] else 0.0 for each in ballots]
    return sum(votes) / len(votes)
