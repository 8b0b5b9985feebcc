"""Supervised fine-tuning: the mean squared error of each row."""

import pytest
import torch

from diffpref.objectives import SFT
from diffpref.types import Outputs


def outputs(policy: torch.Tensor, target: torch.Tensor) -> Outputs:
    return Outputs(policy, target, None, torch.ones(len(policy)), torch.ones(len(policy)))


def test_two_rows_by_hand():
    policy = torch.tensor([[1.0, 3.0], [0.0, -2.0]]).reshape(2, 1, 1, 2)
    target = torch.tensor([[0.0, 1.0], [0.5, 1.0]]).reshape(2, 1, 1, 2)
    loss, metrics = SFT()(outputs(policy, target))
    assert loss.tolist() == pytest.approx([(1 + 4) / 2, (0.25 + 9) / 2])
    assert metrics["policy_error_chosen"].tolist() == loss.tolist()


def test_gradient_points_to_the_target():
    policy = torch.tensor([[[[2.0]]], [[[-1.0]]]], requires_grad=True)
    SFT()(outputs(policy, torch.zeros(2, 1, 1, 1)))[0].sum().backward()
    assert policy.grad.flatten().tolist() == [4.0, -2.0]


def test_half_precision_is_reduced_in_fp32():
    policy = torch.randn(2, 4, 8, 8).to(torch.bfloat16)
    loss, _ = SFT()(outputs(policy, torch.zeros_like(policy)))
    assert torch.equal(loss, policy.float().square().flatten(1).mean(1))


def test_needs_neither_pairs_nor_reference():
    assert not SFT.needs_pairs
    assert not SFT.needs_reference
