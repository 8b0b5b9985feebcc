"""Draws are functions of position: pinned values, so that no release changes the course of a run."""

import numpy as np
import torch

from diffpref.draws import WINDOW, block_permutation, draw_seed, generator, permutation, uniform


def test_seeds_are_pinned():
    assert draw_seed(0) == 4246866556266386882
    assert draw_seed(7, "sample", 2, 31) == 4141395732771135911
    assert draw_seed("a red circle") == 1934406655020654534


def test_numbers_are_pinned():
    assert uniform(123, "flip") == 0.7275266217850095
    noise = torch.randn(3, generator=generator(123, "noise"))
    torch.testing.assert_close(noise, torch.tensor([-0.075427, -1.7810031, 0.6796471]), atol=1e-6, rtol=0)
    assert permutation(5, 1, 8).tolist() == [5, 2, 1, 4, 6, 7, 3, 0]


def test_seeds_fit_63_bits_and_parts_do_not_run_together():
    seeds = {draw_seed(*parts) for parts in [(1, 23), (12, 3), (123,), ("1", "2", "3"), (1, 2, "3.0")]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(draw_seed(number) for number in range(100)) > 2**62  # all 63 bits are used


def test_purposes_are_independent():
    drawn = np.array([[uniform(draw, purpose) for purpose in ("flip", "prompt")] for draw in range(4000)])
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.06  # four standard deviations
    counts, _ = np.histogram(drawn[:, 0], bins=10, range=(0, 1))
    assert abs(counts - 400).max() < 5 * 19
    first, second = (torch.randn(500, generator=generator(9, purpose)) for purpose in ("noise", "time"))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


def test_a_draw_gives_the_same_each_time_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = (torch.randn(4, generator=generator(9, "noise")) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_permutations_hold_everything_once_and_change_with_seed_and_epoch():
    orders = [permutation(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_a_block_order_is_pinned_and_holds_every_sample_once():
    assert sorted(block_permutation(5, 1, 1003, 10).tolist()) == list(range(1003))
    assert block_permutation(5, 1, 1003, 10).tolist() == block_permutation(5, 1, 1003, 10).tolist()
    orders = [block_permutation(seed, epoch, 1003, 10).tolist() for seed, epoch in ((5, 1), (5, 2), (6, 1))]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_a_block_order_reads_few_blocks_at_a_time():
    count, block = 4000, 20
    order = block_permutation(0, 0, count, block)
    windows = order.reshape(-1, WINDOW * block)
    blocks = [set(window.tolist()) for window in windows // block]
    assert all(len(each) == WINDOW for each in blocks) and len(set.union(*blocks)) == count // block
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.3  # the blocks' own order is any
    assert sum(np.diff(order) == 1) < 100  # and within a window, items of different blocks are mixed
