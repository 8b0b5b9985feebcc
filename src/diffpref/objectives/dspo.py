"""DSPO: Zhu et al. 2025, ICLR (OpenReview xyfb9HHvMe), as the SD1.5 branch of its `train.py` computes it.

loss = the mean over elements of ((policy - target) - beta (1 - p) (policy - reference))^2 at the chosen image, with
p = sigmoid(-beta/2 * ((L_w - L_l) - (R_w - R_l))): score matching to a target that is moved away from the reference.
The rejected image acts through p alone, which carries a gradient, as in the code (huaishengzhu/DSPO). At the published
beta of 0.001, p hardly leaves 1/2, and the loss is close to supervised fine-tuning.

The paper has a lambda_t both before the reward and before the difference; the code has one constant beta, halved in p
and whole in the difference. This is that formula, for every family and prediction type; the code knows noise alone. Its
SDXL branch is another loss, without the target: the mean of ((1 - p) (policy - reference))^2 where the batch's mean
(policy - reference)^2 is at least 0.1, else of (1 - p)^2, with a beta of 5000. It depends on how a batch is split and
is not offered. beta has to be below 1: from there on, the chosen image could be pushed away from its target.

beta is not DPO's: it also weighs the move of the target, so it has no `auto`. A label q below 1 weighs both orders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from diffpref.traits import ObjectiveTraits

if TYPE_CHECKING:
    from torch import Tensor

    from diffpref.types import Metrics, Outputs


@dataclass(frozen=True)
class DSPO(ObjectiveTraits):
    """(policy - target - beta (1 - p) (policy - reference))^2, mean at the chosen image, p = sigmoid(-beta/2 Delta)."""

    beta: float = 0.001
    """How far the target is moved away from the reference, and the inverse temperature within p."""
    name: Literal["dspo"] = "dspo"
    needs_prediction: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ("beta",)
    below_one: ClassVar[tuple[str, ...]] = ("beta",)

    def __call__(self, outputs: Outputs) -> tuple[Tensor, Metrics]:
        """The loss of each pair, (pairs,) fp32, and metrics of each pair."""
        import torch

        gain_chosen, gain_rejected = outputs.gain().chunk(2)
        margin = self.beta / 2 * (gain_chosen - gain_rejected)
        doubt = torch.cat([-margin, margin]).sigmoid()  # 1 - p of each row as the chosen one
        if outputs.reference is None:
            raise ValueError("this objective needs the reference's prediction, and none was made")
        away = outputs.policy.float() - outputs.reference.float()
        moved = outputs.target.float() + self.beta * doubt.reshape(-1, 1, 1, 1) * away
        right, wrong = replace(outputs, target=moved).policy_error().chunk(2)
        loss = outputs.label * right + (1 - outputs.label) * wrong
        return loss, outputs.pair_metrics(margin)
