"""The order with buckets: runs of one shape, every item equally often, the same for any split of a step."""

from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
from accelerate import Accelerator

from diffpref.data.ahead import Ahead
from diffpref.data.order import Order
from diffpref.draws import block_permutation, permutation
from diffpref.objectives import DPO
from diffpref.train.config import TrainConfig
from diffpref.train.step import Learner
from diffpref.train.strategy import Replicated

SIZES = (23, 9, 4, 1)  # items of each bucket, 37 together
RUN = 6


def order(sizes=SIZES, run: int = RUN, seed: int = 0, block: int | None = None) -> Order:
    """The items of a bucket are 100 times its number and on."""
    members = tuple(100 * bucket + np.arange(size) for bucket, size in enumerate(sizes))
    return Order(seed, members, run, block)


def items(given: Order, count: int) -> list[int]:
    return [given.item(place) for place in range(count)]


@pytest.mark.parametrize("run", [1, 6, 50])
@pytest.mark.parametrize("block", [None, 3])
def test_one_bucket_is_a_sequence_of_permutations(run, block):
    def expected(epoch: int) -> list[int]:
        found = permutation(5, epoch, 13) if block is None else block_permutation(5, epoch, 13, 3)
        return found.tolist()

    assert items(order((13,), run, 5, block), 52) == [item for epoch in range(4) for item in expected(epoch)]


def test_a_run_has_one_bucket():
    found = np.array(items(order(), 100 * RUN)).reshape(100, RUN) // 100
    assert (found == found[:, :1]).all() and set(found[:, 0].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("run", [1, 2, 6, 20, 300])
@pytest.mark.parametrize("block", [None, 4])
def test_no_item_comes_again_before_its_whole_bucket_has_come(run, block):
    found = items(order(run=run, block=block), (40 * 37 // run + 40) * run)
    for bucket, size in enumerate(SIZES):
        stream = [item for item in found if item // 100 == bucket]
        passes = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert all(sorted(turn) == [100 * bucket + k for k in range(size)] for turn in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])
        if size > 4:
            assert passes[0] != passes[1]


@pytest.mark.parametrize("run", [1, 2, 6, 20, 300])
def test_after_any_epoch_each_bucket_lags_by_less_than_a_run(run):
    given = order(run=run)
    counts, done = Counter(), 0
    for epoch in range(1, 200):
        stop = sum(epoch * size // run for size in SIZES) * run  # counted here anew
        counts.update(given.item(place) // 100 for place in range(done, stop))
        done = stop
        for bucket, size in enumerate(SIZES):
            assert 0 <= epoch * size - counts[bucket] < run
        if run == 1:
            assert counts == {bucket: epoch * size for bucket, size in enumerate(SIZES)}


def test_the_buckets_of_an_epoch_are_mixed():
    one, other = order((60, 60), 6), order((60, 60), 6, seed=1)

    def buckets(given: Order, epoch: int) -> list[int]:
        return [given.item(epoch * 120 + 6 * run) // 100 for run in range(20)]

    assert all(sorted(buckets(one, epoch)) == [0] * 10 + [1] * 10 for epoch in range(5))
    assert len({tuple(buckets(given, epoch)) for given in (one, other) for epoch in range(5)}) == 10


def test_a_place_is_looked_up_in_any_order():
    whole = items(order(), 600)
    for place in (599, 3, 250, 42, 251, 0):
        assert order().item(place) == whole[place]
    given = order()
    assert [given.item(place) for place in reversed(range(600))] == whole[::-1]


def test_far_places_take_no_search():
    given, first = order((90, 3, 1), 2048), 10**9 * 2048
    for run in range(6):
        found = [given.item(first + 2048 * run + within) for within in range(2048)]
        size = (90, 3, 1)[found[0] // 100]
        assert len({item // 100 for item in found}) == 1
        counts = Counter(found).values()
        assert len(counts) == size and max(counts) - min(counts) <= 2  # a pass that was begun before, and one after


def test_what_stands_later_is_of_the_same_pass():
    given = order((5, 7), 1)
    for place in range(24):
        bucket = given.item(place) // 100
        size = (5, 7)[bucket]
        assert sorted(given.item(place, later) for later in range(size)) == [100 * bucket + k for k in range(size)]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micros", [1, 2])
def test_any_split_of_a_step_sees_the_same_items_in_one_shape(processes, micros):
    size, steps, given = 16 // processes // micros, 40, order(run=16)
    whole = np.array(items(given, 16 * steps)).reshape(steps, 16)
    train = TrainConfig(batch_size=size, gradient_accumulation_steps=micros)
    for step in range(steps):
        seen = []
        for process in range(processes):
            accelerator = Mock(spec=Accelerator, num_processes=processes, process_index=process)
            learner = Learner(accelerator, Mock(spec=Replicated), Mock(), None, Mock(), Mock(spec=Ahead), DPO(), train)
            for micro in range(micros):
                seen.append([given.item(place) for place in learner.places(step, micro)])
        assert all(len({item // 100 for item in batch}) == 1 for batch in seen)
        assert sorted(item for batch in seen for item in batch) == sorted(whole[step].tolist())
