"""Splits by prompt: which split a prompt belongs to is a function of its text alone."""

from collections.abc import Mapping

from diffpref.errors import UserError

SPLIT_NAME = r"\w+"


def read_shares(text: str) -> dict[str, float]:
    """`train=0.9,test=0.1` as a dict. Raises UserError where it cannot be read; `check_shares` judges it."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = (piece.strip() for piece in part.partition("="))
        try:
            value = float(share)
        except ValueError:
            raise UserError(f"--splits: {part!r} is not NAME=SHARE, as in train=0.9,test=0.1") from None
        if name in shares:
            raise UserError(f"--splits names {name!r} twice")
        shares[name] = value
    return shares


def check_shares(shares: Mapping[str, float]) -> None:
    """Raises UserError where a share is not above 0, or all together are not 1."""
    for name, share in shares.items():
        if not share > 0:
            raise UserError(f"--splits: the share of {name!r} must be above 0, not {share:g}")
    if shares and abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"--splits: the shares must add up to 1, not {sum(shares.values()):g}")


def split_of_prompt(prompt: str, shares: Mapping[str, float]) -> str:
    """The prompt's split. Its text is hashed to a number in [0, 1); the shares cut that range in their order.

    It is the hash of `data.holdout` for another purpose, so that holding out a share of the train split still works.
    """
    from diffpref.draws import draw_seed, uniform  # here, for it brings torch along

    place, end = uniform(draw_seed(prompt), "split"), 0.0
    for name, share in shares.items():
        end += share
        if place < end:
            return name
    return name  # where rounding leaves the last end below 1
