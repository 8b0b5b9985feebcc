"""Diffusion-DPO: hand values, gradient signs, identities, and an independent NumPy computation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpref.objectives import DPO
from diffpref.types import Outputs


def outputs(policy, reference, target=None, label=None) -> Outputs:
    policy, reference = torch.as_tensor(policy), torch.as_tensor(reference)
    pairs = len(policy) // 2
    return Outputs(
        policy=policy,
        target=torch.zeros_like(policy) if target is None else target,
        reference=reference,
        label=torch.ones(pairs) if label is None else torch.tensor(label),
        weight=torch.ones(pairs),
    )


def random_outputs(pairs: int, seed: int = 0, dtype=torch.float32) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    policy, reference, target = (torch.randn(2 * pairs, 4, 3, 3, generator=g).to(dtype) for _ in range(3))
    policy = reference + 0.05 * policy
    return replace(outputs(policy, reference, target), label=torch.ones(pairs))


def constant_rows(*errors: float) -> torch.Tensor:
    """Rows whose mean square is the given error, with unequal elements."""
    return torch.tensor([[0.0, math.sqrt(2 * error)] for error in errors], dtype=torch.float32).reshape(-1, 2, 1, 1)


def test_two_pairs_by_hand():
    # pair 1: L_w 0.10, L_l 0.30, R_w 0.20, R_l 0.25: delta = -0.20 + 0.05 = -0.15
    # pair 2: L_w 0.50, L_l 0.40, R_w 0.45, R_l 0.45: delta = 0.10
    policy, reference = constant_rows(0.10, 0.50, 0.30, 0.40), constant_rows(0.20, 0.45, 0.25, 0.45)
    loss, metrics = DPO(beta=10.0)(outputs(policy, reference))
    expected = [math.log(1 + math.exp(-0.75)), math.log(1 + math.exp(0.5))]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert metrics["reward_margin"].tolist() == pytest.approx([0.75, -0.5], rel=1e-5)
    assert metrics["implicit_accuracy"].tolist() == [1.0, 0.0]
    assert metrics["policy_error_chosen"].tolist() == pytest.approx([0.1, 0.5])
    assert metrics["policy_error_rejected"].tolist() == pytest.approx([0.3, 0.4])
    assert metrics["reference_error"].tolist() == pytest.approx([0.225, 0.45])


def test_soft_label_by_hand():
    policy, reference = constant_rows(0.10, 0.30), constant_rows(0.20, 0.25)  # margin 0.75 at beta 10
    loss, _ = DPO(beta=10.0)(outputs(policy, reference, label=[0.8]))
    expected = 0.8 * math.log(1 + math.exp(-0.75)) + 0.2 * math.log(1 + math.exp(0.75))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_pulls_chosen_in_and_pushes_rejected_out():
    chosen = torch.full((1, 1, 2, 2), 0.5, requires_grad=True)
    rejected = torch.full((1, 1, 2, 2), 0.5, requires_grad=True)
    reference = torch.full((2, 1, 2, 2), 0.5)
    loss, _ = DPO(beta=100.0)(outputs(torch.cat([chosen, rejected]), reference))
    loss.sum().backward()
    assert (chosen.grad > 0).all()  # descent lowers the chosen prediction towards its target 0
    assert (rejected.grad < 0).all()
    # d/dL_w of -log sigmoid(-beta/2 delta) at delta 0 is beta/4; dL_w/dprediction is 2 * 0.5 / 4
    assert chosen.grad.flatten().tolist() == pytest.approx([100 / 4 * 2 * 0.5 / 4] * 4)


def test_equal_to_the_reference_is_log_two_and_no_reward():
    at_start = random_outputs(5)
    loss, metrics = DPO()(replace(at_start, policy=at_start.reference))
    assert loss.tolist() == pytest.approx([math.log(2)] * 5, abs=1e-7)
    assert metrics["reward_margin"].tolist() == [0.0] * 5
    assert metrics["implicit_accuracy"].tolist() == [0.5] * 5


@pytest.mark.parametrize(("beta", "tolerance"), [(10.0, 1e-6), (500.0, 1e-5)])  # fp32 holds 1e-7 of a margin
def test_agrees_with_numpy(beta, tolerance):
    given = random_outputs(16)
    policy, reference, target = (x.double().numpy() for x in (given.policy, given.reference, given.target))
    error = ((policy - target) ** 2).reshape(32, -1).mean(1)
    error_reference = ((reference - target) ** 2).reshape(32, -1).mean(1)
    delta = (error[:16] - error[16:]) - (error_reference[:16] - error_reference[16:])
    expected = np.logaddexp(0, beta / 2 * delta)
    loss, _ = DPO(beta=beta)(given)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=0, atol=tolerance)


def test_splitting_the_batch_changes_nothing():
    whole = random_outputs(6)
    loss, _ = DPO()(whole)

    def pair(i: int) -> Outputs:
        pick = [i, i + 6]
        return replace(
            whole,
            policy=whole.policy[pick],
            target=whole.target[pick],
            reference=whole.reference[pick],
            label=whole.label[[i]],
            weight=whole.weight[[i]],
        )

    assert torch.cat([DPO()(pair(i))[0] for i in range(6)]).tolist() == pytest.approx(loss.tolist(), rel=1e-5)


def test_swapping_chosen_and_rejected_negates_the_margin():
    given = random_outputs(4)
    swap = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    swapped = replace(given, policy=given.policy[swap], target=given.target[swap], reference=given.reference[swap])
    margin = DPO()(given)[1]["reward_margin"]
    assert torch.allclose(DPO()(swapped)[1]["reward_margin"], -margin)
    loss, other = DPO()(given)[0], DPO()(swapped)[0]
    assert torch.allclose(loss - other, -margin, atol=1e-3)  # log(1+e^-m) - log(1+e^m) = -m


def test_half_precision_predictions_are_reduced_in_fp32():
    given = random_outputs(3, dtype=torch.bfloat16)
    loss, metrics = DPO()(given)
    as_float = replace(
        given, policy=given.policy.float(), reference=given.reference.float(), target=given.target.float()
    )
    assert loss.dtype == torch.float32
    assert torch.equal(loss, DPO()(as_float)[0])
    assert all(value.dtype == torch.float32 for value in metrics.values())


def test_one_bad_row_stays_its_own():
    given = random_outputs(4)
    policy = given.policy.clone()
    policy[6, 0, 0, 0] = float("nan")  # the rejected image of pair 2
    loss, _ = DPO()(replace(given, policy=policy))
    assert loss.isfinite().tolist() == [True, True, False, True]


def test_without_a_reference_it_says_so():
    with pytest.raises(ValueError, match="needs a reference"):
        DPO()(replace(random_outputs(1), reference=None))
