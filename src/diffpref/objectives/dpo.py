"""Diffusion-DPO: Wallace et al. 2023, arXiv 2311.12908, eq. 14, as the published `train.py` computes it.

loss = -log sigmoid(-beta/2 * ((L_w - L_l) - (R_w - R_l))), with L and R the mean squared errors over elements. The
factor 1/2 and the mean (not the sum) are the published code's, and with them its beta of 5000. A label q below 1
(a tie is 1/2) weighs both orders: q log sigmoid(z) + (1 - q) log sigmoid(-z); q = 1 is the paper's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from diffpref.types import Metrics, Outputs


@dataclass(frozen=True)
class DPO:
    """Hyper-parameters of Diffusion-DPO. beta: how strongly the policy is held to the reference."""

    beta: float = 5000.0
    name: Literal["dpo"] = "dpo"
    needs_reference: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = True

    def __call__(self, outputs: Outputs) -> tuple[Tensor, Metrics]:
        """The loss of each pair, (pairs,) fp32, and metrics of each pair."""
        from torch.nn.functional import logsigmoid

        gain_chosen, gain_rejected = outputs.gain().chunk(2)
        margin = self.beta / 2 * (gain_chosen - gain_rejected)  # -beta/2 ((L_w - L_l) - (R_w - R_l))
        loss = -(outputs.label * logsigmoid(margin) + (1 - outputs.label) * logsigmoid(-margin))
        policy_chosen, policy_rejected = outputs.policy_error().detach().chunk(2)
        reference_chosen, reference_rejected = outputs.reference_error().chunk(2)
        seen = margin.detach()
        return loss, {
            "implicit_accuracy": (seen > 0).float() + 0.5 * (seen == 0).float(),
            "reward_margin": seen,
            "policy_error_chosen": policy_chosen,
            "policy_error_rejected": policy_rejected,
            "reference_error": (reference_chosen + reference_rejected) / 2,
        }
