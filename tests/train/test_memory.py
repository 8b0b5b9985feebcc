"""Memory runs out: what is said, that a step taken again is as if taken once, and what is found by trying."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from support.runs import assert_resumes_bit_for_bit, finals, logged, metrics, tiny_config, with_lora

from diffpref.errors import RunError, out_of_memory
from diffpref.objectives import DPO, DRO, KTO
from diffpref.points import Independent, Replay
from diffpref.train import fitting, memory
from diffpref.train.checkpoint import newest
from diffpref.train.config import Config, TrainConfig
from diffpref.train.loop import train
from diffpref.train.optimizers import EXTRAS, make_optimizer


@pytest.fixture
def small(monkeypatch):
    """A network that runs out of memory for more rows than `small.rows`; `small.seen` are the rows that it had."""
    real = UNet2DConditionModel.forward

    class Small:
        rows, seen, error = 10**9, [], torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        gradient_only, draws = True, False

    def forward(self, sample, *given, **more):
        Small.seen.append(len(sample))
        if Small.draws:
            torch.rand(1)
        if len(sample) > Small.rows and (torch.is_grad_enabled() or not Small.gradient_only):
            raise Small.error
        return real(self, sample, *given, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    return Small


def config(pipeline: Path, pairs: Path, output: Path, **keys) -> Config:
    return tiny_config(pipeline, pairs, output, **{"batch_size": 8, "max_steps": 3, "checkpointing_steps": 1} | keys)


def close(ours: Path, theirs: Path) -> None:
    """Two runs' losses and weights are the same but for rounding."""
    assert [line["step"] for line in metrics(ours)] == [line["step"] for line in metrics(theirs)]
    for mine, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert mine["lr"] == other["lr"]
    for mine, other in zip(finals(ours), finals(theirs), strict=True):
        # AdamW's first steps have the sign of a gradient, which of a bias before a normalisation is rounding alone
        assert (mine - other).abs().max() < 2 * 3 * 1e-3 and (mine - other).abs().median() < 1e-3


def split_of(run: Path) -> int:
    return newest(run / "checkpoints")[0].state["split"]["micro"]


def test_a_step_is_taken_again_with_half_as_many_items(pipeline, tiny_pairs, tmp_path, small, caplog):
    whole = train(config(pipeline, tiny_pairs, tmp_path / "whole"))
    small.rows, small.seen = 4, []  # of pairs, two
    halved = train(config(pipeline, tiny_pairs, tmp_path / "halved"))
    close(halved, whole)
    assert "out of memory in step 1: it is taken again with 4 items at once" in caplog.text
    assert "out of memory in step 1: it is taken again with 2 items at once" in caplog.text
    assert small.seen[:4] == [16, 16, 8, 8]  # reference and policy: only policies with a gradient fail here
    assert set(small.seen[4:]) == {4}
    assert split_of(halved) == 2 and split_of(whole) == 8


def test_only_the_last_micro_batch_fails_and_nothing_is_counted_twice(pipeline, tiny_pairs, tmp_path, monkeypatch):
    """The failure comes after gradients were added and images were sampled."""
    points = Replay(sampler="ddim", steps=3, trajectories=2, refresh_steps=2, policy_copy_steps=3)

    def run(name: str, failing: set[int]) -> Path:
        chosen = config(pipeline, tiny_pairs, tmp_path / name, gradient_accumulation_steps=2, batch_size=4)
        calls, real = [], DRO.__call__

        def objective(self, outputs):
            calls.append(len(outputs.label))
            if len(calls) in failing:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, outputs)

        with monkeypatch.context() as patch:
            patch.setattr(DRO, "__call__", objective)
            return train(replace(chosen, objective=DRO(margin=5.0), points=points))

    whole, halved = (
        run("whole", set()),
        run("halved", {6}),
    )  # in the third step, which samples anew
    close(halved, whole)
    mine, other = newest(halved / "checkpoints")[0].extra["points"], newest(whole / "checkpoints")[0].extra["points"]
    assert set(mine) == set(other) and int(mine["step"]) == 3
    assert torch.equal(mine["kept.count"], other["kept.count"]) and mine["kept.count"].tolist() == [2] * 8
    for name, kept in mine.items():
        torch.testing.assert_close(kept, other[name], rtol=1e-3, atol=1e-2, msg=name)
    assert split_of(halved) == 2


def test_the_mean_over_the_whole_batch_stays_that(pipeline, tiny_pairs, tmp_path, small):
    def run(name: str) -> Path:
        chosen = config(pipeline, tiny_pairs, tmp_path / name)
        return train(replace(chosen, objective=KTO(beta=100.0), points=Independent()))

    whole = run("whole")
    small.rows = 4
    close(run("halved"), whole)


def test_a_halved_run_resumes_with_its_split_bit_for_bit(pipeline, tiny_pairs, tmp_path, small):
    small.rows = 8
    run = assert_resumes_bit_for_bit(config(pipeline, tiny_pairs, tmp_path / "whole"), tmp_path, cut=2)
    assert split_of(run) == 4
    small.seen = []
    again = replace(config(pipeline, tiny_pairs, run, max_steps=4), output_dir=str(run))
    train(again, resume=True)
    assert set(small.seen) == {8}  # it was not tried with more again


def test_another_split_that_is_asked_for_is_taken_on_resume(pipeline, tiny_pairs, tmp_path, small):
    small.rows = 8
    run = train(config(pipeline, tiny_pairs, tmp_path / "run"))
    small.rows, small.seen = 10**9, []
    train(config(pipeline, tiny_pairs, run, max_steps=4, micro_batch=2), resume=True)
    assert set(small.seen) == {4}


@pytest.mark.parametrize("keys", [{"halve_on_out_of_memory": False}, {"batch_size": 1}])
def test_the_line_names_what_would_help(pipeline, tiny_pairs, tmp_path, small, keys):
    small.rows = 1
    with pytest.raises(RunError) as error:
        train(config(pipeline, tiny_pairs, tmp_path / "run", **keys))
    batch = keys.get("batch_size", 8)
    first = "train.micro_batch 4 (the same effective batch in smaller parts), " if batch == 8 else ""
    last = "" if batch == 8 else ", train.optimizer adamw8bit"
    assert str(error.value) == (
        f"out of memory in step 1, with {batch} pair{'s' * (batch > 1)} at once (train.batch_size {batch} x "
        f"train.gradient_accumulation_steps 1) at data.resolution 32; what helps most: {first}"
        f"train.gradient_checkpointing true, model.lora_rank 64 (in place of the whole network){last}"
    )


def test_what_is_in_force_is_not_proposed(pipeline, tiny_pairs, tmp_path):
    base = tiny_config(pipeline, tiny_pairs, tmp_path / "run")
    assert memory.helps(base, 1) == [
        "train.gradient_checkpointing true",
        "model.lora_rank 64 (in place of the whole network)",
        "train.optimizer adamw8bit",
    ]
    lean = TrainConfig(gradient_checkpointing=True, optimizer="adamw8bit", mixed_precision="bf16")
    assert memory.helps(replace(base, train=lean), 1) == ["model.lora_rank 64 (in place of the whole network)"]
    large = replace(base, train=lean, data=replace(base.data, resolution=1024))
    assert memory.helps(with_lora(large), 1) == ["data.resolution 512"]
    assert memory.helps(with_lora(replace(base, train=lean)), 1) == ["a model of fewer parameters"]
    assert memory.helps(
        with_lora(replace(base, train=replace(lean, gradient_checkpointing="selective", ema=True))), 1
    ) == [
        "train.gradient_checkpointing true",
        "train.offload_ema true",
    ]
    sampling = with_lora(replace(base, train=lean, points=Replay(sampled_at_once=8)))
    assert memory.helps(sampling, 2) == [
        "train.micro_batch 1 (the same effective batch in smaller parts)",
        "points.sampled_at_once 2",
    ]
    followed = replace(lean, reference_decay=0.999, mixed_precision="no")
    assert memory.helps(with_lora(replace(large, train=followed)), 1) == [
        "train.mixed_precision bf16",
        "no train.reference_decay (its reference is a second network)",
        "data.resolution 512",
    ]


@pytest.mark.parametrize(
    ("micro", "own", "half"), [(8, 8, 4), (8, 24, 4), (3, 3, 1), (5, 15, 1), (6, 18, 3), (1, 4, None)]
)
def test_half_of_a_micro_batch_divides_the_step(micro, own, half):
    assert memory.half(micro, own) == half


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("HIP out of memory"), True),
        (MemoryError(), True),
        (np.core._exceptions._ArrayMemoryError((1,), np.dtype("f4")) if hasattr(np, "core") else MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_one):
    assert out_of_memory(error) == is_one


def test_a_real_allocation_that_fails_counts():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(error.value)


def test_a_step_that_the_optimizer_began_is_not_taken_again(pipeline, tiny_pairs, tmp_path, monkeypatch):
    def step(self, *given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", torch.optim.Optimizer.profile_hook_step(step))
    with pytest.raises(RunError, match="out of memory in step 1, with 8 pairs at once"):
        train(config(pipeline, tiny_pairs, tmp_path / "run"))


@pytest.mark.parametrize(("rows", "found"), [(4, 2), (10**9, 12), (15, 6)])
def test_auto_finds_the_greatest_divisor_that_fits(pipeline, tiny_pairs, tmp_path, small, caplog, rows, found):
    caplog.set_level("INFO", "diffpref")
    small.rows = rows
    keys = {"batch_size": 2, "gradient_accumulation_steps": 6, "max_steps": 2, "micro_batch": "auto"}
    run = train(config(pipeline, tiny_pairs, tmp_path / "auto", **keys))
    assert f"train.micro_batch: auto is {found} of 12 items at once" in caplog.text
    assert split_of(run) == found
    if found != 2:
        small.rows = 10**9
        close(run, train(config(pipeline, tiny_pairs, tmp_path / "whole", **keys | {"micro_batch": None})))


@pytest.mark.parametrize("lora", [False, True])
def test_trying_changes_nothing(pipeline, tiny_pairs, tmp_path, small, lora):
    """A run with `auto` that finds batch_size is bit for bit that of batch_size."""

    def run(name: str, micro_batch) -> Path:
        points = Replay(sampler="ddim", steps=3, trajectories=2, refresh_steps=2, policy_copy_steps=3)
        keys = {"batch_size": 2, "gradient_accumulation_steps": 2, "micro_batch": micro_batch, "max_steps": 2}
        chosen = config(pipeline, tiny_pairs, tmp_path / name, **keys)
        chosen = replace(chosen, objective=DRO(margin=5.0), points=points)
        return train(with_lora(chosen) if lora else chosen)

    small.draws = True
    whole = run("whole", None)
    small.rows, drawn = 4, torch.get_rng_state()
    tried = run("tried", "auto")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert split_of(tried) == 2
    assert logged(tried) == logged(whole)
    assert all(torch.equal(a, b) for a, b in zip(finals(tried), finals(whole), strict=True))
    mine, other = newest(tried / "checkpoints")[0], newest(whole / "checkpoints")[0]
    for kept in ("optimizer", "weights"):
        assert all(torch.equal(value, getattr(other, kept)[name]) for name, value in getattr(mine, kept).items())
    assert all(torch.equal(value, other.extra["points"][name]) for name, value in mine.extra["points"].items())


def test_auto_with_a_beta_that_is_auto_and_with_buckets(pipeline, tiny_pairs, tmp_path, small, caplog):
    caplog.set_level("INFO", "diffpref")
    small.rows = 8
    chosen = config(pipeline, tiny_pairs, tmp_path / "run", micro_batch="auto", max_steps=1)
    data = replace(chosen.data, buckets=True, bucket_step=8, cache=str(tmp_path / "cache"))
    train(replace(chosen, objective=DPO(beta="auto"), data=data))
    assert "train.micro_batch: auto is 4 of 8 items at once" in caplog.text
    assert "objective.beta: auto is" in caplog.text


def test_nothing_fits(pipeline, tiny_pairs, tmp_path, small):
    small.rows, small.gradient_only = 1, False
    with pytest.raises(RunError, match="out of memory while trying one item, with 1 pair at once"):
        train(config(pipeline, tiny_pairs, tmp_path / "run", micro_batch="auto"))


def test_what_a_cpu_cannot_take_is_foreseen(pipeline, tiny_pairs, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "diffpref")
    took = iter([50, 70, 100])
    monkeypatch.setattr(memory.HostMeter, "peak", lambda self: next(took))
    monkeypatch.setattr(memory.HostMeter, "free", staticmethod(lambda: 150.0))
    train(config(pipeline, tiny_pairs, tmp_path / "run", micro_batch="auto", max_steps=1))
    assert "train.micro_batch: auto is 4 of 8 items at once" in caplog.text  # where 2 and 4 took 100, 8 would take 200


def test_the_meter_sees_what_is_taken():
    meter = memory.HostMeter()
    kept = np.ones(2**27, dtype=np.uint8)  # so much that what the process had free before matters little
    assert 2**27 * 0.8 < meter.peak() < 2**27 * 1.5
    del kept
    assert memory.HostMeter.free() > 2**24


def test_a_split_that_does_not_divide_is_refused(capsys):
    from diffpref.__main__ import main

    given = ["--train.batch-size", "4", "--train.micro-batch", "3", "--print-config"]
    assert main(["train", "embedded-dpo", *given]) == 2
    assert "train.micro_batch: 3 does not divide train.batch_size x train.gradient_accumulation_steps = " in (
        capsys.readouterr().err
    )


def test_the_split_stands_in_the_checkpoint(pipeline, tiny_pairs, tmp_path):
    run = train(config(pipeline, tiny_pairs, tmp_path / "run", micro_batch=2, max_steps=1))
    state = json.loads((run / "checkpoints" / "step-1" / "state.json").read_text())
    assert state["split"] == {"asked": [8, 1, 2, 1, "cpu"], "micro": 2}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "schedule_free"])
def test_what_stands_in_for_the_optimizer_is_as_large_as_its_state(name):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name][0])
    weights = torch.nn.Parameter(torch.ones(256, 512))
    optimizer = make_optimizer([weights], TrainConfig(optimizer=name))
    held = sum(tensor.nbytes for tensor in fitting._stand_ins(optimizer, name))
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    kept = [value for value in optimizer.state[weights].values() if isinstance(value, torch.Tensor) and value.ndim]
    real = sum(value.nbytes for value in kept)
    if name == "adafactor":  # what it needs in passing is more than what it keeps
        assert (held, real) == (weights.nbytes, 4 * (256 + 512))
    else:
        assert real * 0.9 < held <= real
    assert fitting._stand_ins(optimizer, name) == []
