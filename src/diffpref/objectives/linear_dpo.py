"""Linear-DPO: Li et al. 2026, arXiv 2605.21123, as the published `train/train_sd_dpo.py` computes it.

loss = w (L_w - L_l), w = clamp(0.2 beta Delta + 0.5, eta, 1 - eta) without gradient, Delta = (L_w - L_l) - (R_w - R_l).
DPO's gradient is the same with the weight sigmoid(beta/2 Delta), times beta/2. A pair that the policy orders worse than
the reference (Delta > 0) weighs more, one that it orders better weighs less, but never less than eta. The loss is no
log-likelihood: with policy and reference equal w is 1/2 and the loss (L_w - L_l) / 2, of either sign; only its gradient
means something, and it is beta/2 times smaller than DPO's, so learning rates are larger (5e-6).

The official file is `train/train_sd_dpo.py` of Whynot0101/Linear-DPO, `--linear_dpo`; `train_sd3_dpo.py` has the same
lines for flows. The paper also moves the reference after the policy, as an average of decay 0.95 to 0.995; that is no
part of the loss but a matter of the reference: `train.reference_decay` (there `--use_ema_ref` and `--decay_ema`). In
the published SDXL script the reference stands still.

A label q below 1 weighs both orders, q w(Delta) (L_w - L_l) + (1 - q) w(-Delta) (L_l - L_w), which is
(w - (1 - q)) (L_w - L_l), since w(-Delta) = 1 - w(Delta): a tie pulls Delta to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from diffpref.traits import ObjectiveTraits

if TYPE_CHECKING:
    from torch import Tensor

    from diffpref.types import Metrics, Outputs

SLOPE = 0.2  # of the weight, with beta and Delta: the published code's


@dataclass(frozen=True)
class LinearDPO(ObjectiveTraits):
    """w (L_w - L_l), with a weight w that is linear in the implicit reward's margin between two bounds."""

    beta: float | Literal["auto"] = 100.0
    """How fast the weight changes with the margin, as in DPO; `auto` takes it from the first batch's errors."""
    eta: float = 1e-3
    """The least weight of a pair, and what the greatest lacks of 1; below a half."""
    name: Literal["linear_dpo"] = "linear_dpo"
    positive: ClassVar[tuple[str, ...]] = ("beta",)
    below_half: ClassVar[tuple[str, ...]] = ("eta",)

    def __call__(self, outputs: Outputs) -> tuple[Tensor, Metrics]:
        """The loss of each pair, (pairs,) fp32, and metrics of each pair."""
        from diffpref.types import calibrated

        beta = calibrated(self.beta)
        gain_chosen, gain_rejected = outputs.gain().chunk(2)
        ahead = gain_chosen - gain_rejected  # -Delta
        weight = (0.5 - SLOPE * beta * ahead.detach()).clamp(self.eta, 1 - self.eta)
        error_chosen, error_rejected = outputs.policy_error().chunk(2)
        loss = (weight - (1 - outputs.label)) * (error_chosen - error_rejected)
        return loss, outputs.pair_metrics(beta / 2 * ahead)
