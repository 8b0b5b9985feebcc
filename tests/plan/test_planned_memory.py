"""The planned memory against what torch's allocator gave in a real step on the CPU, within 10%."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from support.runs import tiny_config, with_lora
from torch.profiler import ProfilerActivity, profile

from diffpref.data.ahead import Ahead
from diffpref.models import folder
from diffpref.models.loading import DTYPES, load_backbone
from diffpref.models.speed import checkpoint_activations
from diffpref.plan.estimate import Planner, optimizer_bytes
from diffpref.plan.ledger import bytes_of, held
from diffpref.presets import preset
from diffpref.reference import adapters_off, frozen_copy
from diffpref.train.config import ModelConfig, TrainConfig
from diffpref.train.optimizers import make_optimizer
from diffpref.train.placing import make_placer
from diffpref.train.preferences import open_preferences
from diffpref.train.step import Learner
from diffpref.train.strategy import Replicated

SHARE = 0.10


def profiled_peak(work) -> int:
    """The most bytes that were there at once, of those allocated while `work()` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events: list = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measured(config) -> int:
    """Bytes at the peak of the second optimizer step of a real run."""
    accelerator = Accelerator(mixed_precision=config.train.mixed_precision, cpu=True)
    dtype = DTYPES[config.train.mixed_precision]
    backbone = load_backbone(config.model, accelerator.device, dtype, trainable=True)
    loader = open_preferences(config, backbone, accelerator)[0]
    reference = adapters_off(backbone) if config.model.lora_rank else frozen_copy(backbone)
    checkpoint_activations(backbone.net, config.train.gradient_checkpointing)
    optimizer = make_optimizer([p for p in backbone.net.parameters() if p.requires_grad], config.train)
    place = make_placer(config.points, backbone, reference, config.train, accelerator)
    net, optimizer = accelerator.prepare(backbone.net, optimizer)
    policy = backbone.with_net(net)
    learner = Learner(
        accelerator, Replicated(accelerator), policy, reference, place, Ahead(loader), config.objective, config.train
    )
    learner.step(0, optimizer)
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    weights = bytes_of(held(backbone.net))
    standing = weights + bytes_of(states) + (0 if config.model.lora_rank else weights)
    return standing + profiled_peak(lambda: learner.step(1, optimizer))


def planned(config) -> int:
    with folder.without_weights():
        return Planner(config, "cpu").memory().peak


@pytest.mark.parametrize("checkpointing", [False, "selective", True], ids=["kept", "selective", "checkpointed"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("batch", [2])
def test_a_tiny_model(pipeline, tiny_pairs, tmp_path, batch, lora, precision, checkpointing):
    train = {"batch_size": batch, "mixed_precision": precision, "gradient_checkpointing": checkpointing}
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", **train)
    config = with_lora(config) if lora else config
    assert planned(config) == pytest.approx(measured(config), rel=SHARE)


@pytest.mark.parametrize(
    ("lora", "train"),
    [
        (False, {"batch_size": 4}),
        (True, {"batch_size": 2, "mixed_precision": "bf16"}),
        (False, {"batch_size": 2, "gradient_accumulation_steps": 3, "gradient_checkpointing": True}),
        (False, {"batch_size": 3, "optimizer": "adafactor"}),
        (False, {"batch_size": 1, "optimizer": "schedule_free"}),
    ],
    ids=["plain", "lora", "accumulated-checkpointed", "adafactor", "schedule-free"],
)
def test_the_embedded_model(tiny_pairs, tmp_path, lora, train):
    config = tiny_config(tmp_path, tiny_pairs, tmp_path / "run", **train)
    config = replace(config, model=ModelConfig(pretrained="embedded"))
    config = with_lora(config) if lora else config
    assert planned(config) == pytest.approx(measured(config), rel=SHARE)


def reduced_sd15():
    """SD1.5's U-Net at a fifth of its width: what is kept of activations is then larger than the weights."""
    from diffusers import UNet2DConditionModel

    from diffpref.plan.architectures import PUBLISHED

    settings = PUBLISHED["stable-diffusion-v1-5/stable-diffusion-v1-5"].parts["unet"]
    return UNet2DConditionModel.from_config({**settings, "block_out_channels": [64, 128, 256, 256]})


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "checkpointing"), [("no", False), ("bf16", True)])
def test_sd15s_proportions(precision, checkpointing):
    """At 32 latents a side, one pair, with a step written here by hand: policy, reference, backward, AdamW."""
    from diffpref.models.sd import StableDiffusion
    from diffpref.plan.simulate import run_step

    backbone = load_backbone(ModelConfig(), torch.device("cpu"), torch.float32, trainable=True)
    assert isinstance(backbone, StableDiffusion)
    real = reduced_sd15().eval()
    config = preset("embedded-dpo")
    train = replace(config.train, batch_size=1, mixed_precision=precision, gradient_checkpointing=checkpointing)
    config = replace(config, train=train, data=replace(config.data, resolution=128))
    told = torch.randn(2, 16, 768)
    with torch.device("meta"):
        sketch = reduced_sd15().eval()
    step = run_step(config, backbone.with_net(sketch), "cpu")

    if checkpointing:
        real.enable_gradient_checkpointing()
    reference, optimizer = copy.deepcopy(real), torch.optim.AdamW(real.parameters(), fused=True)
    x, t, target = torch.randn(2, 4, 32, 32), torch.tensor([3, 3]), torch.randn(2, 4, 32, 32)

    def work():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
            known = reference(x, t, told, return_dict=False)[0].float()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            predicted = real(x, t, told, return_dict=False)[0].float()
        ((predicted - target).square().mean() - (known - target).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    work()
    assert step.peak == pytest.approx(profiled_peak(work), rel=SHARE)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "schedule_free", "adamw8bit"])
def test_states_of_optimizers(name):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    shapes = [(64, 32, 3, 3), (128, 300), (128,), (4096,), (5, 7)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = make_optimizer(parameters, TrainConfig(optimizer=name, learning_rate=1e-3, lr_scheduler="constant"))
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    found = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    size = sum(value.numel() * value.element_size() for value in found if value.numel() not in (1, 256))
    assert optimizer_bytes(name, shapes)[0] == pytest.approx(size, rel=0.01)
