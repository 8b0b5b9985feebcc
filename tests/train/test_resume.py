"""A run cut after any checkpoint and resumed is the uncut run, bit for bit."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.runs import assert_resumes_bit_for_bit, logged, metrics, tiny_config, with_lora

from diffpref.errors import UserError
from diffpref.train.checkpoint import newest
from diffpref.train.loop import train


def assert_equal_checkpoints(a, b) -> None:
    first, second = newest(a / "checkpoints")[0], newest(b / "checkpoints")[0]
    assert first.step == second.step
    for part in ("weights", "optimizer"):
        one, other = getattr(first, part), getattr(second, part)
        assert one.keys() == other.keys() and len(one) > 3
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("lora", [False, True])
def test_resume_from_every_checkpoint_is_bit_equal(pipeline, tiny_pairs, tmp_path, lora):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "uncut", lr_scheduler="cosine", lr_warmup_steps=2)
    config = with_lora(config) if lora else config
    uncut = train(config)
    for cut in (2, 4):
        run = tmp_path / f"cut-{cut}"
        shutil.copytree(uncut, run)
        for later in range(cut + 1, 7):
            shutil.rmtree(run / "checkpoints" / f"step-{later}", ignore_errors=True)
        shutil.rmtree(run / "final")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')  # the line that was being written when the run was killed
        train(replace(config, output_dir=str(run)), resume=True)
        assert_equal_checkpoints(uncut, run)
        assert logged(uncut) == logged(run)
    assert newest(uncut / "checkpoints")[0].weights.keys() != {}


@pytest.mark.parametrize("lora", [False, True])
def test_a_moving_reference_resumes_bit_for_bit(pipeline, tiny_pairs, tmp_path, lora):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", reference_decay=0.5)
    run = assert_resumes_bit_for_bit(with_lora(config) if lora else config, tmp_path, cut=2)
    first, second = metrics(run)[:2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["reward_margin"] == 0
    still = replace(config, output_dir=str(tmp_path / "still"), train=replace(config.train, reference_decay=None))
    standing = metrics(train(with_lora(still) if lora else still))[:2]
    assert standing[0]["reference_error"] == pytest.approx(first["reference_error"], abs=1e-6)
    assert standing[1]["reference_error"] != second["reference_error"]


def test_a_damaged_checkpoint_is_passed_over(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run")
    run = train(config)
    expected = load_file(run / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    damaged = run / "checkpoints" / "step-6" / "weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    train(config, resume=True)
    found, passed_over = newest(run / "checkpoints")
    assert found.step == 6 and passed_over == []
    again = load_file(run / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_resume_of_a_run_without_checkpoints_starts_it(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=1)
    train(config, resume=True)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]


def test_more_steps_may_be_asked_for(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=2)
    train(config)
    train(replace(config, train=replace(config.train, max_steps=3)), resume=True)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_another_configuration_is_refused(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=1)
    train(config)
    with pytest.raises(UserError, match=r"objective\.beta: the run to resume has 100\.0 .*, not 200\.0"):
        train(replace(config, objective=replace(config.objective, beta=200.0)), resume=True)
    with pytest.raises(UserError, match="holds a run; add --resume"):
        train(config)


def test_what_changes_memory_and_speed_alone_may_change(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=2, ema=True)
    train(config)
    other = {"max_steps": 3, "gradient_checkpointing": "selective", "channels_last": True, "offload_ema": True}
    train(replace(config, train=replace(config.train, **other)), resume=True)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_old_checkpoints_are_pruned(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=2)
    train(config)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-5", "step-6"]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-6" / "manifest.json").read_text())["files"]
    assert set(manifest) == {"weights.safetensors", "optimizer.safetensors", "state.json"}


def test_the_batch_may_be_split_otherwise_but_not_changed(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=2, batch_size=4)
    train(config)
    more = replace(config.train, max_steps=3)
    with pytest.raises(UserError, match=r"is 6, but the run to resume has 4"):
        train(replace(config, train=replace(more, batch_size=6)), resume=True)
    assert "batch_size: 4" in (tmp_path / "run" / "config.yaml").read_text()  # the refused run left no trace
    train(replace(config, train=replace(more, batch_size=2, gradient_accumulation_steps=2)), resume=True)
    assert [line["pairs_seen"] for line in metrics(tmp_path / "run")] == [4, 8, 12]
