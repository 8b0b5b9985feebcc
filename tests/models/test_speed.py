"""Compiled blocks, channels last, checkpointing in part: the same numbers, plain names, and no late compilation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from support.families import FAMILIES
from support.runs import assert_resumes_bit_for_bit, finals, metrics, tiny_config, with_lora
from support.tiny import load, points, predict
from torch._dynamo.utils import counters

from diffpref.models import speed
from diffpref.models.loading import load_backbone
from diffpref.objectives import DRO
from diffpref.points import Paired, Replay
from diffpref.reference import frozen_copy
from diffpref.train.config import ModelConfig
from diffpref.train.loop import train
from diffpref.train.step import Learner
from diffpref.types import Batch, Points

CPU = torch.device("cpu")
ONE_OF_EACH = ["sd", "sdxl", "sd3", "flux-dev", "qwenimage"]


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    """dynamo as always, without inductor behind it: what is traced and when is the same, in seconds."""
    monkeypatch.setattr(speed, "BACKEND", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def compiled(monkeypatch) -> list[int]:
    """The number of graphs compiled in each optimizer step of the runs that follow."""
    noted, step = [], Learner.step

    def counted(self, number, optimizer):
        before = graphs()
        taken = step(self, number, optimizer)
        noted.append(graphs() - before)
        return taken

    monkeypatch.setattr(Learner, "step", counted)
    return noted


def test_a_compiled_run_is_the_plain_one_and_compiles_no_more_after_step_2(pipeline, tiny_pairs, tmp_path, compiled):
    def config(name: str, compile: bool):
        chosen = tiny_config(
            pipeline, tiny_pairs, tmp_path / name, max_steps=4, gradient_accumulation_steps=2, compile=compile, ema=True
        )
        data = replace(chosen.data, holdout=0.2)  # looked at in batches of another size
        return replace(chosen, data=data, validation=replace(chosen.validation, steps=2))

    plain, quick = train(config("plain", False)), train(config("quick", True))
    assert sum(compiled[:4]) == 0  # the plain run's
    assert sum(compiled[4:6]) > 3 and compiled[6:] == [0, 0]
    for name in ("loss", "grad_norm"):
        ours, theirs = ([line[name] for line in metrics(run)] for run in (quick, plain))
        assert ours == pytest.approx(theirs, rel=1e-3)
    for ours, theirs in zip(finals(quick), finals(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    unet = diffusers.UNet2DConditionModel.from_pretrained(quick / "final" / "unet")
    assert not any("_orig_mod" in name for name in unet.state_dict())
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 3  # none given up for its many shapes


@pytest.mark.slow
def test_compiled_replay_with_lora_checkpointing_and_a_copied_policy_resumes(pipeline, tiny_pairs, tmp_path, compiled):
    settings = {"compile": True, "gradient_checkpointing": True, "max_steps": 4, "gradient_accumulation_steps": 2}
    config = with_lora(tiny_config(pipeline, tiny_pairs, tmp_path / "run", **settings))
    points = Replay(steps=3, sampler="ddim", policy_copy_steps=2, sampled_at_once=2)
    assert_resumes_bit_for_bit(replace(config, objective=DRO(), points=points), tmp_path, cut=2)
    assert sum(compiled[:2]) > 3 and compiled[2:4] == [0, 0]


def test_a_copy_is_compiled_only_if_asked(pipeline):
    backbone = load(pipeline, trainable=True)
    at = points(backbone)
    speed.compile_blocks(backbone.net)
    before = graphs()
    known = frozen_copy(backbone)(at.x_t, at.t, at.cond)
    assert graphs() == before
    again = frozen_copy(backbone, speed.compile_blocks)(at.x_t, at.t, at.cond)
    assert graphs() > before
    torch.testing.assert_close(again, known)
    assert again.is_inference()


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """The bytes of activations that a forward keeps for its backward pass, each storage once."""
    storages: dict[int, int] = {}
    total = [0]

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if not isinstance(value, torch.nn.Parameter) and storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.nbytes()
            total[0] += storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield total


def of_family(name: str, folder: Path) -> Any:
    """The family's backbone with all of it to train."""
    return load_backbone(ModelConfig(str(FAMILIES[name](folder))), CPU, torch.float32, True)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_checkpointing_saves_more_the_more_is_checkpointed_and_changes_no_gradient(name, tmp_path):
    found, kept = [], []
    for mode in (False, "selective", True):
        backbone = of_family(name, tmp_path / f"{mode}")
        speed.checkpoint_activations(backbone.net, mode)
        shape = backbone.latent_shape(32, 32)
        latents = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
        cond = backbone.encode_prompts(["red", "blue"] * 2)
        batch = Batch(latents, cond, torch.ones(2), torch.ones(2), ("a", "b"), (3, 4))
        at: Points = Paired()(batch, backbone.schedule)
        with saved_bytes() as total:
            loss = backbone.predict(at.x_t, at.t, at.cond).square().mean()
        loss.backward()
        kept.append(total[0])
        found.append({key: value.grad for key, value in backbone.net.named_parameters() if value.grad is not None})
    assert kept[0] > kept[1] > kept[2], kept
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_attention_is_torchs_scaled_dot_product(name, tmp_path, monkeypatch):
    backbone = of_family(name, tmp_path / "pipeline")
    processors = [type(each).__name__ for each in backbone.net.attn_processors.values()]
    assert processors and not [each for each in processors if each in ("AttnProcessor", "SlicedAttnProcessor")]
    calls, plain = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    latents = torch.randn(2, *backbone.latent_shape(32, 32))
    cond = backbone.encode_prompts(["red", "blue"])
    calls.clear()  # the text encoder's
    with torch.no_grad():
        backbone.predict(latents, torch.tensor([10, 500]), cond)
    assert len(calls) == len(processors)


def test_channels_last_is_the_same_run_and_resumes(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=4, channels_last=True, ema=True)
    run = assert_resumes_bit_for_bit(config, tmp_path, cut=2)
    plain = train(tiny_config(pipeline, tiny_pairs, tmp_path / "plain", max_steps=4, ema=True))
    ours, theirs = ([line["loss"] for line in metrics(each)] for each in (run, plain))
    assert ours == pytest.approx(theirs, abs=1e-3)
    for one, other in zip(finals(run), finals(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_channels_last_is_for_u_nets_on_a_gpu_or_if_asked(pipeline):
    def laid_out(wanted, device):
        backbone = load(pipeline, trainable=True)
        speed.channels_last(backbone.net, wanted, device)
        weight = backbone.net.get_parameter("down_blocks.0.resnets.0.conv1.weight")
        return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()

    assert not laid_out(None, CPU) and laid_out(True, CPU)
    assert laid_out(None, torch.device("cuda")) and not laid_out(False, torch.device("cuda"))
    backbone = load(pipeline, trainable=True)
    expected = predict(backbone, points(backbone))
    speed.channels_last(backbone.net, True, CPU)
    torch.testing.assert_close(predict(backbone, points(backbone)), expected)
