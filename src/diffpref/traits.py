"""What an objective and a placement of points tell of themselves, with the usual answers. Imports no torch."""

from typing import ClassVar


class Limits:
    """Which keys have which limits, for the check of a configuration; a key that is None or `auto` has none."""

    positive: ClassVar[tuple[str, ...]] = ()
    not_negative: ClassVar[tuple[str, ...]] = ()
    below_one: ClassVar[tuple[str, ...]] = ()  # from 0 up
    below_half: ClassVar[tuple[str, ...]] = ()  # from 0 up


class ObjectiveTraits(Limits):
    """What an objective needs."""

    needs_reference: ClassVar[bool] = True
    needs_prediction: ClassVar[bool] = False  # the reference's prediction too, not its error alone
    needs_pairs: ClassVar[bool] = True  # two rows an item, all preferred ones first; else one row an item
    needs_disliked: ClassVar[bool] = False  # single images of label 0 are among its items
    needs_mean_gain: ClassVar[bool] = False  # `Outputs.mean_gain` is filled in


class PlacementTraits(Limits):
    """What points are made of and what they make."""

    takes_pairs: ClassVar[bool] = True  # the data must be pairs
    gives_pairs: ClassVar[bool] = True  # two rows an item, all preferred ones first; else one row an item
