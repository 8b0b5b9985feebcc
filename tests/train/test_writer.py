"""Checkpoints are written beside the training: it goes on meanwhile, and hears of what went wrong."""

import json
import math
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import assert_resumes_bit_for_bit, logged, metrics, tiny_config

from diffpref.errors import RunError
from diffpref.objectives import DPO, DRO
from diffpref.points import Replay
from diffpref.train import checkpoint, loop
from diffpref.train.checkpoint import Checkpoint, newest
from diffpref.train.config import GuardConfig
from diffpref.train.loop import train
from diffpref.train.step import NOT_FINITE, Learner, Step
from diffpref.train.writer import Writer


def test_the_training_goes_on_while_a_checkpoint_is_written(pipeline, tiny_pairs, tmp_path, monkeypatch):
    """The first checkpoint cannot be written before step 4 is taken; the weights in it are those of step 2."""
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "held", max_steps=4)
    plain = train(replace(config, output_dir=str(tmp_path / "plain")))
    may_write, threads = threading.Event(), []
    real_save, real_step = checkpoint.save, Learner.step

    def save(folder, captured, *rest):
        threads.append(threading.current_thread())
        assert may_write.wait(60)
        return real_save(folder, captured, *rest)

    def step(self, number, optimizer):
        found = real_step(self, number, optimizer)
        if number == 3:
            assert not list((tmp_path / "held" / "checkpoints").glob("step-*"))
            may_write.set()
        return found

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(Learner, "step", step)
    held = train(config)
    assert threading.main_thread() not in threads and len(threads) == 2
    for name in ("step-2", "step-4"):
        a, b = (load_file(run / "checkpoints" / name / "weights.safetensors") for run in (plain, held))
        assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert logged(held) == logged(plain)
    assert all(0 <= line["checkpoint_wait"] < 1 for line in metrics(held))
    assert metrics(held)[2]["checkpoint_wait"] > 0 == metrics(held)[1]["checkpoint_wait"]


def test_the_next_copy_waits_for_the_write_before(tmp_path):
    """For it takes the same memory; and it hears of that write's error."""
    writer, order, may_write = Writer(), [], threading.Event()

    def copy(step: int) -> Checkpoint:
        order.append(f"copy {step}")
        return Checkpoint(step, {}, {}, {}, {})

    def save(captured: Checkpoint) -> Path:
        assert may_write.wait(60)
        order.append(f"save {captured.step}")
        if captured.step == 2:
            raise OSError(28, "No space left on device")
        return tmp_path

    writer.write(lambda host: copy(1), save)
    threading.Timer(0.2, may_write.set).start()
    writer.write(lambda host: copy(2), save)
    assert order[:3] == ["copy 1", "save 1", "copy 2"] and writer.waited > 0
    with pytest.raises(RunError, match="the checkpoint of step 2 could not be written"):
        writer.write(lambda host: copy(3), save)
    writer.close()
    assert order == ["copy 1", "save 1", "copy 2", "save 2"]


@pytest.mark.parametrize("broken", [4, 6])  # in the middle, and at the end
def test_a_checkpoint_that_cannot_be_written_ends_the_run(pipeline, tiny_pairs, tmp_path, monkeypatch, broken):
    real = checkpoint.save_file

    def save_file(tensors, path, *rest):
        real(tensors, path, *rest)
        if path.name == "optimizer.safetensors" and path.parent.name.startswith(f".step-{broken}-"):
            raise OSError(28, "No space left on device")

    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        with pytest.raises(RunError) as told:
            train(config)
    assert re.match(
        rf"the checkpoint of step {broken} needs [\d,]+ bytes: no space left .*; that of step {broken - 2} stays",
        str(told.value),
    )
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step}" for step in range(2, broken, 2)]
    train(config, resume=True)
    assert newest(folder)[0].step == 6 and [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 7))


def test_another_error_of_the_run_lets_the_checkpoint_be_finished(pipeline, tiny_pairs, tmp_path, monkeypatch):
    may_write, real_save, real_step = threading.Event(), checkpoint.save, Learner.step

    def save(*rest):
        assert may_write.wait(60)
        return real_save(*rest)

    def step(self, number, optimizer):
        if number == 2:
            may_write.set()
            raise RunError("something else")
        return real_step(self, number, optimizer)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(Learner, "step", step)
    with pytest.raises(RunError, match="something else"):
        train(tiny_config(pipeline, tiny_pairs, tmp_path / "run"))
    assert newest(tmp_path / "run" / "checkpoints")[0].step == 2


def test_a_rollback_waits_for_the_checkpoint_that_it_goes_back_to(pipeline, tiny_pairs, tmp_path, monkeypatch):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "plain", max_steps=6, learning_rate=1e-2)
    config = replace(config, guard=GuardConfig("rollback", share=1e-4, steps=2))
    plain = train(config)
    rates = [line["lr"] for line in metrics(plain)]
    assert min(rates) < max(rates)  # it did go back
    real = checkpoint.save

    def slow(*rest):
        threading.Event().wait(0.3)
        return real(*rest)

    monkeypatch.setattr(checkpoint, "save", slow)
    assert logged(train(replace(config, output_dir=str(tmp_path / "slow")))) == logged(plain)


def rolling(config):
    return replace(config, guard=GuardConfig("rollback", share=1e-4, steps=2))


def replaying(config):
    return replace(config, objective=DRO(), points=Replay(sampler="ddim", steps=3, trajectories=2, refresh_steps=2))


PARTS = {
    "weights": {},
    "optimizer": {},
    "ema": {"ema": True, "ema_decay": 0.5},
    "reference": {"reference_decay": 0.5},
    "points": {},
    "guard": {"learning_rate": 1e-2},
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_checkpoint_is_needed(pipeline, tiny_pairs, tmp_path, monkeypatch, part):
    """Without it the resumed run is another one, or none; that with it it is the uncut one is tested elsewhere."""
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=7, checkpointing_steps=1, **PARTS[part])
    config = {"guard": rolling, "points": replaying}.get(part, lambda same: same)(config)
    real = checkpoint.load

    def without(found):
        loaded = real(found)
        if part in ("weights", "optimizer"):
            return replace(loaded, **{part: {k: torch.zeros_like(v) for k, v in getattr(loaded, part).items()}})
        if part == "guard":
            fresh = {"count": 0, "warned": False, "rollbacks": 0, "good": None}
            return replace(loaded, state=loaded.state | {"guard": fresh})
        return replace(loaded, extra={})

    assert_resumes_bit_for_bit(config, tmp_path / "whole", cut=5) if part in ("points", "guard") else None
    monkeypatch.setattr(checkpoint, "load", without)
    with pytest.raises((AssertionError, KeyError, RunError)):
        assert_resumes_bit_for_bit(replace(config, output_dir=str(tmp_path / "again")), tmp_path / "lacking", cut=5)


def test_a_resumed_run_keeps_its_beta_and_its_count(pipeline, tiny_pairs, tmp_path, monkeypatch):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=2)
    config = replace(config, objective=DPO(beta="auto"))
    run = train(config)
    monkeypatch.setattr(loop, "calibrated_objective", lambda learner: pytest.fail("found anew"))
    train(replace(config, train=replace(config.train, max_steps=4)), resume=True)
    betas = [json.loads((run / "checkpoints" / f"step-{s}" / "state.json").read_text())["beta"] for s in (2, 4)]
    assert betas[0] == betas[1] > 0
    real = checkpoint.load
    monkeypatch.setattr(
        checkpoint, "load", lambda found: replace(real(found), state=real(found).state | {"non_finite": 2})
    )
    monkeypatch.setattr(Learner, "step", lambda *_: Step({"loss": math.nan}, NOT_FINITE, ()))
    with pytest.raises(RunError, match="3 steps in a row were not finite"):
        train(replace(config, train=replace(config.train, max_steps=5)), resume=True)


def test_the_state_tells_position_and_processes(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=3, gradient_accumulation_steps=2)
    state = json.loads((train(config) / "checkpoints" / "step-3" / "state.json").read_text())
    assert state == {
        "items_per_step": 4, "processes": 1, "looked": True, "non_finite": 0, "scaler": None, "beta": None,
        "guard": {"count": 0, "warned": False, "rollbacks": 0, "good": 3}, "step": 3,
        "skipped": 0, "spikes": None, "split": {"asked": [2, 2, None, 1, "cpu"], "micro": 2},
    }  # fmt: skip
