"""Autocast's rules on the meta device, and the ledger, on operations small enough to count by hand."""

import torch
import torch.nn.functional as F

from diffpref.plan.ledger import Ledger
from diffpref.plan.rules import Rules


def test_a_gpus_norms_are_fp32_and_its_products_bf16():
    x = torch.empty(2, 8, 4, 4, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(8, 8, 1, 1, device="meta", requires_grad=True)
    for device, norm in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
        rules = Rules(torch.bfloat16, device)
        with rules:
            with rules.autocast():
                assert F.group_norm(x, 4).dtype == norm
                assert F.conv2d(x.float(), weight).dtype == torch.bfloat16
            assert F.conv2d(x.float(), weight).dtype == torch.float32  # outside of autocast nothing is cast


def test_casts_of_weights_are_made_once_and_live_until_autocast_ends():
    x, weight = torch.empty(4, 8, device="meta"), torch.empty(16, 8, device="meta", requires_grad=True)
    rules, ledger = Rules(torch.bfloat16, "cuda"), Ledger(1)
    with ledger, rules, torch.no_grad():
        with rules.autocast():
            for _ in range(2):
                F.linear(x, weight)
            assert ledger.live == 2 * 16 * 8
        assert ledger.live == 0
    assert ledger.flops == 2 * (2 * 4 * 8 * 16)
    assert ledger.peak == 2 * (16 * 8 + 4 * 8 + 4 * 16)  # weight, input and output in bf16


def test_what_is_known_and_views_count_nothing():
    x, ledger = torch.empty(100, device="meta"), Ledger()
    ledger.know([x])
    with ledger:
        x.add_(1).view(10, 10)
        assert ledger.live == 0
        kept = x + 1
        assert ledger.live == 512  # 400 bytes in the allocator's blocks
    del kept
    assert ledger.live == 0
