"""What every model family must show, on a small random pipeline of its real classes: see support.families."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from support.families import FAMILIES, IDLE, MODEL, NO_IMAGES, OPEN, PLAIN
from support.tiny import SIDE

from diffpref.evaluate.generate import to_images
from diffpref.models.loading import load_backbone
from diffpref.objectives import DPO
from diffpref.points import Paired
from diffpref.reference import adapters_off, frozen_copy
from diffpref.sampling import SAMPLERS, Sampling, sample, samplers_of, scheduler_of
from diffpref.train.config import ModelConfig
from diffpref.types import Batch, Outputs, Points

CPU = torch.device("cpu")
PROMPTS = ["a large red circle", "a small blue cross on the left, grey background"]
GUIDANCE, STEPS = 3.0, 3
METHODS = ["full", "lora"]


@pytest.fixture(scope="module", params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory) -> Path:
    """The family's folder. Tests only read it."""
    return FAMILIES[name](tmp_path_factory.mktemp("family") / "pipeline")


def load(name: str, folder: Path, method: str | None = None, **model: Any):
    """The family's backbone: frozen, or with all of it or its adapters to train."""
    if method == "lora":
        model = {"lora_rank": 2, **model}
    config = ModelConfig(pretrained=str(folder), **{**MODEL.get(name, {}), **model})
    torch.manual_seed(0)
    return load_backbone(config, CPU, torch.float32, trainable=method is not None)


def opened(folder: Path, name: str) -> Any:
    """The folder as plain diffusers opens it."""
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder, **OPEN.get(name, {}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def network(pipeline: Any) -> Any:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def batch_of(backbone) -> Batch:
    """Two pairs of random latents."""
    shape = backbone.latent_shape(SIDE, SIDE)
    latents = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(2)
    return Batch(latents, backbone.encode_prompts(PROMPTS * 2), ones, ones, ("one", "two"), (3, 4))


def points_of(backbone) -> Points:
    return Paired()(batch_of(backbone), backbone.schedule)


def predict(backbone) -> torch.Tensor:
    """What the network predicts at the points of the batch."""
    at = points_of(backbone)
    with torch.no_grad():
        return backbone.predict(at.x_t, at.t, at.cond)


def loss_of(backbone, reference, at: Points) -> torch.Tensor:
    with torch.no_grad():
        known = reference(at.x_t, at.t, at.cond)
    predicted = backbone.predict(at.x_t, at.t, at.cond)
    return DPO(beta=100.0)(Outputs(predicted, at.target, known, at.label, at.weight))[0]


def train(backbone, method: str, steps: int = 3) -> list[float]:
    """Steps of DPO; their losses. Without weight decay, so that only what has a gradient moves."""
    reference = frozen_copy(backbone) if method == "full" else adapters_off(backbone)
    at = points_of(backbone)
    trained = [parameter for parameter in backbone.net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        losses.append(loss_of(backbone, reference, at))
        losses[-1].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.detach().tolist() for loss in losses]


@pytest.fixture(scope="module", params=METHODS)
def method(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(name, folder, method) -> Any:
    """A backbone after three steps, with what was so before and the losses. Tests only read it."""
    backbone = load(name, folder, method)
    before = {key: value.clone() for key, value in backbone.net.state_dict().items()}
    return backbone, before, train(backbone, method)


@pytest.fixture(scope="module")
def saved(trained, method, tmp_path_factory) -> Path:
    """What is saved of it."""
    target = tmp_path_factory.mktemp("final")
    trained[0].save(target, lora=method == "lora")
    return target


def test_the_reference_starts_as_the_policy_bit_for_bit(name, folder, method):
    backbone = load(name, folder, method)
    reference, at = (frozen_copy if method == "full" else adapters_off)(backbone), points_of(backbone)
    assert torch.equal(reference(at.x_t, at.t, at.cond), backbone.predict(at.x_t, at.t, at.cond))


def test_the_first_loss_is_log_2_and_falls(trained):
    first, *_, last = trained[2]
    assert first == pytest.approx([0.6931471805599453] * 2, abs=1e-6)
    assert sum(last) < sum(first) - 1e-3


def test_steps_change_every_trainable_tensor_and_no_other(name, trained, method):
    backbone, before, _ = trained
    parameters = dict(backbone.net.named_parameters())
    for key, value in backbone.net.state_dict().items():
        trains = key in parameters and parameters[key].requires_grad
        usual = "lora_" in key if method == "lora" else key in parameters
        assert trains == (usual and not key.startswith(IDLE.get(name, ()))), key
        assert torch.equal(value, before[key]) != trains, key
        assert not trains or value.dtype == torch.float32


@pytest.fixture(scope="module")
def plain(name, folder, method, saved) -> Any:
    """Plain diffusers' pipeline with what is saved."""
    if method == "full":
        return opened(saved, name)
    pipeline = opened(folder, name)
    pipeline.load_lora_weights(saved)
    return pipeline


@pytest.fixture(scope="module")
def base(name, folder) -> torch.Tensor:
    """What the family's network predicts before any training."""
    return predict(load(name, folder))


def test_saved_weights_reload_to_the_same_prediction(name, trained, method, saved, plain, base):
    backbone = trained[0]
    again = load(name, saved, method) if method == "full" else backbone.with_net(network(plain))
    assert again.net is not backbone.net
    assert torch.equal(predict(again), predict(backbone))
    assert not torch.equal(predict(again), base)


def test_what_is_saved_opens_plainly_with_the_same_images(name, trained, plain):
    backbone = trained[0]
    torch.testing.assert_close(predict(backbone.with_net(network(plain))), predict(backbone), atol=1e-6, rtol=1e-5)
    if name in NO_IMAGES:
        return
    sampler = samplers_of(backbone.scheduler_config)[0]
    scheduler, how = scheduler_of(sampler, backbone.scheduler_config), Sampling(sampler, STEPS, GUIDANCE)
    plain.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(plain.scheduler.config)
    asked = {"num_inference_steps": STEPS, "height": SIDE, "width": SIDE}
    asked |= PLAIN.get(name, {"guidance_scale": GUIDANCE})
    for prompt in (PROMPTS[0], ""):
        image = to_images(backbone.decode(sample(backbone, scheduler, [prompt], [7], SIDE, how)))[0]
        expected = plain(prompt, generator=torch.Generator().manual_seed(7), **asked).images[0]
        apart = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-3  # a batch of two rounds otherwise than twice one


def test_rectangular_images_are_those_of_plain_diffusers(name, folder, monkeypatch):
    """With positions, sizes and shifts as the pipeline makes them: so buckets are seen as the family means them."""
    if name in NO_IMAGES:
        pytest.skip("it draws no image from a prompt alone")
    backbone, pipe = load(name, folder), opened(folder, name)
    shape = backbone.latent_shape(40, 24)
    assert shape[2] > shape[1]
    monkeypatch.setattr(type(backbone), "latent_shape", lambda self, width, height: shape)
    sampler = samplers_of(backbone.scheduler_config)[0]
    scheduler, how = scheduler_of(sampler, backbone.scheduler_config), Sampling(sampler, STEPS, GUIDANCE)
    pipe.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(pipe.scheduler.config)
    asked = {"num_inference_steps": STEPS, "height": 24, "width": 40} | PLAIN.get(name, {"guidance_scale": GUIDANCE})
    image = to_images(backbone.decode(sample(backbone, scheduler, [PROMPTS[0]], [7], SIDE, how)))[0]
    expected = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(7), **asked).images[0]
    assert image.size == expected.size == (40, 24)
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_a_saved_lora_fuses_to_the_same_prediction(name, folder, trained, method, saved):
    if method == "full":
        whole = load(name, folder, method, unet=str(saved))
        assert torch.equal(predict(whole), predict(trained[0]))
        return
    for file in ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"):
        fused = load(name, folder, lora=(str(saved / file),))
        torch.testing.assert_close(predict(fused), predict(trained[0]), atol=2e-6, rtol=1e-5)


def test_with_adapters_off_it_is_the_base_bit_for_bit(trained, method, base):
    backbone = trained[0]
    at = points_of(backbone)
    if method == "lora":
        assert torch.equal(adapters_off(backbone)(at.x_t, at.t, at.cond), base)
    assert not torch.equal(predict(backbone), base)


def test_gradient_checkpointing_changes_no_gradient(name, folder, method):
    backbone = load(name, folder, method)
    torch.manual_seed(1)
    for key, value in backbone.net.named_parameters():
        if "lora_B" in key:  # it starts at zero, and A would get no gradient
            torch.nn.init.normal_(value, std=0.1)
    reference, at = (frozen_copy if method == "full" else adapters_off)(backbone), points_of(backbone)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            backbone.net.enable_gradient_checkpointing()
        assert backbone.net.is_gradient_checkpointing is checkpointing
        loss_of(backbone, reference, at).mean().backward()
        found.append({key: value.grad for key, value in backbone.net.named_parameters() if value.requires_grad})
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found[-1].values())
        backbone.net.zero_grad()
    torch.testing.assert_close(found[1], found[0])


def test_what_trains_is_fp32_under_bf16(name, folder, method):
    lora = {"lora_rank": 2} if method == "lora" else {}
    config = ModelConfig(pretrained=str(folder), **{**MODEL.get(name, {}), **lora})
    backbone = load_backbone(config, CPU, torch.bfloat16, trainable=True)
    trained = [value for value in backbone.net.parameters() if value.requires_grad]
    others = [value for value in backbone.net.parameters() if not value.requires_grad]
    assert trained and {value.dtype for value in trained} == {torch.float32}
    assert method == "full" or {value.dtype for value in others} >= {torch.bfloat16}
    at = points_of(backbone)
    with torch.autocast("cpu", torch.bfloat16):
        backbone.predict(at.x_t, at.t, at.cond).float().square().mean().backward()
    assert {value.grad.dtype for value in trained if value.grad is not None} == {torch.float32}


def test_overlong_counts_prompts_whose_ends_are_cut(name, folder):
    backbone = load(name, folder)
    assert backbone.overlong(["red", "red " * 2000, "", "blue " * 2000]) == {1, 3}


def test_conditioning_has_a_row_for_each_prompt(name, folder):
    backbone = load(name, folder)
    cond, empty = backbone.encode_prompts(PROMPTS), backbone.encode_unconditional(2)
    assert list(cond) == list(empty) == list(backbone.cond_names)
    assert all(len(rows) == 2 and rows.shape == empty[key].shape for key, rows in cond.items())
    assert not any(torch.equal(rows, empty[key]) for key, rows in cond.items())


def test_identity_names_the_weights(name, folder):
    backbone = load(name, folder)
    assert set(backbone.identity()) == {"vae", "text"}
    assert backbone.identity() == load(name, folder, "lora").identity()
