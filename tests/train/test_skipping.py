"""Steps that are not applied: whose fault it was, what a spike is, and that a resumed run judges as the uncut one."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.learners import learner_for
from support.runs import assert_resumes_bit_for_bit, metrics, tiny_config
from support.tiny import make_pairs, write_pairs

from diffpref.errors import RunError, UserError
from diffpref.objectives import DPO, KTO
from diffpref.points import Independent
from diffpref.train.check import check
from diffpref.train.loop import train
from diffpref.train.spikes import LEAST, WINDOW, Spikes
from diffpref.types import Outputs

BAD = 7.0  # the weight that marks an item


class Hollow(DPO):
    """A loss that is finite, of which a marked item's gradient is not: that of a square root at 0."""

    def __call__(self, outputs: Outputs):
        loss, found = super().__call__(outputs)
        sound = (outputs.weight != BAD).float()
        root = (sound * outputs.policy_error().chunk(2)[0]).sqrt()
        return loss + root - root.detach(), found


@pytest.fixture
def marked(tmp_path):
    """Builds a dataset of pairs of which some are marked by their weights."""

    def build(weight: float, rows: tuple[int, ...], count: int = 8):
        weights = [weight if number in rows else 1.0 for number in range(count)]
        return write_pairs(tmp_path / "pairs", make_pairs(count, weight=weights))

    return build


@pytest.mark.parametrize("micros", [1, 4])
def test_a_gradient_that_is_not_finite_names_its_items(pipeline, marked, tmp_path, micros):
    split = {"batch_size": 8 // micros, "gradient_accumulation_steps": micros}
    config = tiny_config(pipeline, marked(BAD, (2, 5)), tmp_path / "run", **split)
    learner, optimizer, state = learner_for(replace(config, objective=Hollow(beta=10.0)))
    before = [parameter.detach().clone() for parameter in learner.policy.net.parameters()]
    taken = learner.step(0, optimizer)
    assert np.isfinite(taken.entry["loss"]) and not np.isfinite(taken.entry["grad_norm"])
    assert taken.skipped == "not finite" and sorted(taken.items) == ["pair-2", "pair-5"]
    after = list(learner.policy.net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
    (tmp_path / "run").mkdir()
    state.step = 1
    state.count(taken)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert '"skipped": "not finite"' in line and '"pair-2"' in line


def test_three_such_steps_end_the_run(pipeline, marked, tmp_path):
    config = tiny_config(pipeline, marked(BAD, tuple(range(8))), tmp_path / "run", max_steps=9)
    with pytest.raises(RunError, match=r"3 steps in a row were not finite, the last at step 3: pair-"):
        train(replace(config, objective=Hollow(beta=10.0)))


def test_a_loss_that_is_not_finite_names_its_items_alone(pipeline, tiny_pairs, tmp_path):
    class Broken(KTO):
        def __call__(self, outputs: Outputs):
            loss, found = super().__call__(outputs)
            return loss / torch.tensor([1.0, 1.0, 0.0]), found

    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", batch_size=3, gradient_accumulation_steps=2)
    learner, optimizer, _ = learner_for(replace(config, objective=Broken(beta=10.0), points=Independent()))
    names = [learner.data.loader.batch(learner.places(0, micro)).id[2] for micro in (0, 1)]
    taken = learner.step(0, optimizer)
    assert taken.skipped == "not finite" and list(taken.items) == names
    assert np.isnan(taken.entry["loss"])


def test_a_spike_is_above_a_multiple_of_the_median():
    spikes = Spikes(3.0)
    for number in range(LEAST):
        assert not spikes.judge(100.0 if number == 3 else 1.0, 2.0)  # nothing is usual yet
    assert not spikes.judge(3.0, 6.0)  # at the bound
    assert spikes.judge(3.01, 2.0)
    assert spikes.judge(1.0, 6.01)
    assert not spikes.judge(1.0, 2.0)
    assert not spikes.judge(-50.0, 2.0)


def test_a_level_that_stays_becomes_the_usual_one():
    spikes = Spikes(3.0)
    for _ in range(WINDOW):
        spikes.judge(1.0, 1.0)
    skipped = [spikes.judge(10.0, 1.0) for _ in range(WINDOW)]
    assert skipped == [True] * (WINDOW // 2) + [False] * (WINDOW // 2)


def test_negative_losses_are_no_spikes_by_their_size():
    spikes = Spikes(2.0)
    for _ in range(LEAST):
        spikes.judge(-1.0, 1.0)
    assert not spikes.judge(5.0, 1.0)
    assert spikes.judge(-1.0, 3.0)


def test_spikes_are_skipped_and_a_resumed_run_skips_the_same(pipeline, marked, tmp_path):
    settings = {"max_steps": 22, "checkpointing_steps": 10, "skip_spikes": 20.0, "ema": True}
    config = tiny_config(pipeline, marked(1000.0, (5,), 24), tmp_path / "run", **settings)
    run = assert_resumes_bit_for_bit(config, tmp_path, cut=20)
    lines = metrics(run)
    high = [line["step"] for line in lines if line["grad_norm"] > 20 * np.median([e["grad_norm"] for e in lines])]
    assert len(high) == 2 and high[0] <= LEAST  # one in each epoch of 12 steps; the first comes before any can be told
    skipped = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"skipped": "a spike"' in line]
    assert [f'"step": {step},' in line for step, line in zip(high[1:], skipped, strict=True)] == [True]
    assert all("pair-5" in line for line in skipped)
    assert lines[-1]["steps_skipped"] == 1


def test_a_skipped_spike_leaves_the_weights(pipeline, tiny_pairs, tmp_path):
    learner, optimizer, state = learner_for(tiny_config(pipeline, tiny_pairs, tmp_path / "run", skip_spikes=1.5))
    for _ in range(LEAST):
        state.spikes.judge(1e-6, 1e-6)
    before = [parameter.detach().clone() for parameter in learner.policy.net.parameters()]
    taken = learner.step(0, optimizer)
    assert taken.skipped == "a spike" and len(taken.items) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.net.parameters(), strict=True))


def test_a_factor_that_skips_everything_is_refused(pipeline, tiny_pairs, tmp_path):
    with pytest.raises(UserError, match=r"train\.skip_spikes: 1\.0 is not above 1"):
        check(tiny_config(pipeline, tiny_pairs, tmp_path / "run", skip_spikes=1.0))


TWO = """
import torch
from accelerate import Accelerator
from diffpref.train.seen import Seen
accelerator = Accelerator(cpu=True)
own = accelerator.process_index
seen = Seen(4)
for micro in (0, 1):
    position = 2 * micro + own
    loss = torch.tensor([float("nan") if position in (1, 3) else 1.0 + position])
    metric = torch.tensor([float("nan") if position == 0 else float(position)])
    seen.add([position], (f"item-{position}",), loss, {"metric": metric})
told = seen.read(accelerator, torch.tensor(0.5))
names = seen.names_at(told.broken)
assert names == ["item-1", "item-3"], names
assert told.losses[0] == 1.0 and told.losses[2] == 3.0, told
assert told.means == {"metric": 2.0} and told.grad_norm == 0.5, told
print("agreed")
"""


def test_every_process_knows_whose_fault_it_was(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("agreed") == 2, done.stderr[-3000:]
