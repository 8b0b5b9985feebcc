"""`diffpref plan`: parameters and FLOPs against published and hand-computed figures, GPUs, what fits, the command."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.commands import fails
from support.runs import tiny_config, with_lora
from torch.utils.flop_counter import FlopCounterMode

from diffpref.__main__ import main
from diffpref.errors import UserError
from diffpref.models import folder
from diffpref.models.loading import load_backbone
from diffpref.plan.architectures import PUBLISHED, local
from diffpref.plan.estimate import Planner
from diffpref.plan.fitting import Fitter, halved, variants
from diffpref.plan.gpus import GPUS, gpu
from diffpref.plan.planning import make_plan
from diffpref.plan.simulate import run_encoding, text_flops
from diffpref.presets import PRESETS, preset
from diffpref.train.config import ModelConfig
from diffpref.train.loop import train

META = torch.device("meta")
COUNTS = {  # network, VAE, text encoders: as the checkpoints on the hub have them
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, 83_653_863, [123_060_480]),
    "stabilityai/stable-diffusion-2-1": (865_910_724, 83_653_863, [340_387_840]),
    "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, 83_653_863, [123_060_480, 694_659_840]),
    "stabilityai/sdxl-turbo": (2_567_463_684, 83_653_863, [123_060_480, 694_659_840]),
    "stabilityai/stable-diffusion-3.5-medium": (2_243_171_520, 83_819_683, [123_650_304, 694_659_840, 4_762_310_656]),
    "stabilityai/stable-diffusion-3.5-large": (8_056_627_520, 83_819_683, [123_650_304, 694_659_840, 4_762_310_656]),
    "black-forest-labs/FLUX.1-dev": (11_901_408_320, 83_819_683, [123_060_480, 4_762_310_656]),
    "black-forest-labs/FLUX.1-schnell": (11_891_178_560, 83_819_683, [123_060_480, 4_762_310_656]),
    "Qwen/Qwen-Image": (20_430_401_088, 126_892_531, [8_292_166_656]),
    "stabilityai/stable-diffusion-xl-refiner-1.0": (2_259_526_660, 83_653_863, [694_659_840]),
}
VARIANTS = {"stabilityai/sdxl-turbo": "turbo", "stabilityai/stable-diffusion-xl-refiner-1.0": "refiner"}


def numel(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name, tmp_path):
    with folder.without_weights():
        model, notes = local(ModelConfig(name, VARIANTS.get(name, "base")), tmp_path)
        backbone = load_backbone(model, META, torch.float32, trainable=True)
        counted = [numel(part.encoder) for part in backbone.text_parts]
        assert (numel(backbone.net), numel(backbone.vae.model), counted) == COUNTS[name]
    assert "published architecture" in notes[0]


@pytest.mark.parametrize("name", [config.model.pretrained for config in PRESETS.values()])
def test_every_preset_has_its_architecture(name):
    assert name == "embedded" or name in PUBLISHED


def test_flops_of_sd15(tmp_path):
    """Against hand-kept oracle figures: a pair of full training 8.67 TF uncached, 0.803 a forward, 1.117 a VAE's."""
    config = preset("sd15-dpo")
    config = replace(config, train=replace(config.train, batch_size=1))
    with folder.without_weights():
        planner = Planner(replace(config, model=local(config.model, tmp_path)[0]))
        work = planner.work
        assert work.forward / 2e12 == pytest.approx(0.803, rel=0.01)
        assert work.reference == work.forward
        assert work.backward == pytest.approx(2 * work.forward, rel=0.01)
        assert work.total(cached=False) / 1e12 == pytest.approx(8.67, rel=0.01)
        assert work.total(cached=False) / work.total(cached=True) == pytest.approx(1.35, rel=0.01)
        assert run_encoding(planner.backbone, 256, 2).flops / 1e12 == pytest.approx(0.273, rel=0.01)
        assert text_flops(planner.backbone.text_parts[0]) / 1e12 == pytest.approx(0.013, rel=0.02)
        full = planner.memory()
        eight = planner.memory(optimizer="adamw8bit")
    assert full.weights == full.reference == full.gradients == 4 * 859_520_964
    assert full.optimizer == 8 * 859_520_964
    assert full.peak - eight.peak == pytest.approx(6 * 859_520_964, rel=0.02)  # 8 bytes a weight become 2
    # what autocast keeps of the weights in bf16 is more than their half, for activations come to it
    assert full.activations > 2 * 859_520_964


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "limit"),
    [
        ("sd15-dpo-lora", {"batch_size": 1}, 10),
        ("sdxl-dpo-lora", {}, 24),
        ("sd15-dpo", {"optimizer": "adamw8bit", "gradient_checkpointing": True}, 24),
    ],
)
def test_what_the_project_claims_of_memory(name, changes, limit, tmp_path):
    config = preset(name)
    config = replace(config, train=replace(config.train, **changes))
    with folder.without_weights():
        peak = Planner(replace(config, model=local(config.model, tmp_path)[0])).memory().peak
    assert peak < limit * 1e9


@pytest.mark.slow
def test_flops_of_sdxl(tmp_path):
    with folder.without_weights():
        for name, pair in (("sdxl-dpo", 63.85), ("sdxl-dpo-lora", 51.77)):
            config = preset(name)
            config = replace(config, train=replace(config.train, gradient_checkpointing=False))
            place = tmp_path / name
            place.mkdir()
            work = Planner(replace(config, model=local(config.model, place)[0])).work
            assert work.reference / 2e12 == pytest.approx(6.761, rel=0.01)
            assert work.total(cached=False) / 1e12 == pytest.approx(pair, rel=0.02)


@pytest.mark.parametrize("lora", [False, True])
def test_flops_are_those_of_a_real_step(pipeline, tiny_pairs, tmp_path, lora):
    config = tiny_config(pipeline, tiny_pairs, tmp_path)
    config = with_lora(config) if lora else config
    with folder.without_weights():
        work = Planner(config).work
    backbone = load_backbone(config.model, torch.device("cpu"), torch.float32, trainable=True)
    x, t = torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
    text = torch.randn(2, 16, 16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # which torch's counter knows on the CPU
        with FlopCounterMode(display=False) as forward:
            predicted = backbone.predict(x, t, {"text": text})
        with FlopCounterMode(display=False) as backward:
            predicted.square().mean().backward()
    assert work.forward == forward.get_total_flops()
    assert work.backward == pytest.approx(backward.get_total_flops(), rel=0.01)
    if lora:  # adapters that are off compute nothing
        backbone.net.disable_adapters()
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math, FlopCounterMode(display=False) as reference:
        backbone.predict(x, t, {"text": text})
    assert work.reference == reference.get_total_flops()
    assert (work.reference == work.forward) is not lora


@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_whose_errors_are_kept_takes_nothing(pipeline, tiny_pairs, tmp_path, lora):
    config = tiny_config(pipeline, tiny_pairs, tmp_path, reference_cache=2)
    with folder.without_weights():
        planner = Planner(with_lora(config) if lora else config)
        assert planner.work.reference == 0 and planner.memory().reference == 0


def test_disk_is_what_a_run_writes(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=2, ema=True)
    config = replace(config, data=replace(config.data, cache=str(tmp_path / "cache")))
    run = train(config)

    def size(*files) -> int:
        return sum(file.stat().st_size for file in files)

    disk = make_plan(config, gpu("h100")).disk
    rows = 24 * 2 * 2 * 2 * 4 * 8 * 8  # images, mirrored, fp16
    assert disk["latents"] == rows
    assert rows < size(*(tmp_path / "cache").glob("latents*.safetensors")) < 2 * rows
    assert disk["text"] == 24 * 2 * 16 * 16
    kept = size(*(run / "checkpoints" / "step-2").glob("*.safetensors"))
    assert disk["checkpoint"] == pytest.approx(kept, rel=0.25)  # headers of so small tensors are a fifth
    final = size(*(run / "final").rglob("*.safetensors"))
    assert disk["final"] == pytest.approx(final, rel=0.25)


def test_time_is_work_over_rate(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path, mixed_precision="bf16", gradient_accumulation_steps=100)
    with folder.without_weights():
        planner = Planner(config)
        card = replace(GPUS["h100"], bandwidth=1e30)
        assert planner.seconds(card, 0.5) == pytest.approx(200 * planner.work.total(cached=True) / (989e12 * 0.5))
        slow = replace(GPUS["h100"], half=1e30)
        count = sum(parameter.numel() for parameter in planner.backbone.net.parameters())
        assert planner.seconds(slow, 0.5) == pytest.approx(7 * 4 * count / 3350e9)


def test_what_fits_changes_as_little_as_it_must(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path, batch_size=2)
    with folder.without_weights():
        fitter = Fitter(config, Planner)
        as_is, half = (fitter.planner(0).memory(batch, accumulates=batch < 2).peak for batch in (2, 1))
        eight = fitter.planner(1).memory(1, accumulates=True).peak
        assert fitter.fit((as_is + 1) / 1e9).keys == {}
        assert fitter.fit((as_is - 1) / 1e9).keys == {
            "train.batch_size": "1",
            "train.gradient_accumulation_steps": "2",
        }
        assert half < as_is
        assert fitter.fit((eight + 1) / 1e9).keys["train.optimizer"] == "adamw8bit"


def test_what_no_change_makes_fit():
    class Huge:
        def memory(self, *args, **kwargs):
            return SimpleNamespace(peak=10**12)

    assert Fitter(preset("sd15-dpo"), lambda config: Huge()).fit(141) is None


def test_variants_are_tried_in_the_order_of_their_cost():
    config = preset("sd15-dpo")
    keys = [tuple(key.split(".")[1] for key in variant.keys) for variant in variants(config)]
    assert keys == [
        (),
        ("optimizer",),
        ("gradient_checkpointing",),
        ("optimizer", "gradient_checkpointing"),
        ("lora_rank",),
        ("lora_rank", "gradient_checkpointing"),
    ]
    adafactor = [tuple(variant.keys) for variant in variants(preset("sdxl-dpo"))]
    assert adafactor == [(), ("model.lora_rank",)]  # it has checkpointing already, and smaller states than 8-bit ones
    assert len(list(variants(preset("sdxl-dpo-lora")))) == 1  # it is all of that already
    assert list(halved(12)) == [12, 6, 3]


@pytest.mark.parametrize("name", ["rtx-4090", "RTX 4090", "GeForce RTX 4090", "4090", "nvidia rtx4090"])
def test_gpu_names(name):
    assert gpu(name) is GPUS["rtx-4090"]


@pytest.mark.parametrize("name", ["a100", "rtx-4091", ""])
def test_other_gpu_names(name):
    with pytest.raises(UserError, match="--gpu: unknown"):
        gpu(name)


def test_the_command(capsys):
    assert main(["plan", "embedded-dpo-lora", "--gpu", "l4", "--pairs", "2000", "--train.batch-size", "1"]) == 0
    text = capsys.readouterr().out
    for part in ("LoRA of rank 16", "the adapters off", "disk, GB (2,000 pairs)", "assumed MFU", "fits as it is"):
        assert part in text


def test_the_command_as_json(capsys, pipeline):
    arguments = ["plan", "embedded-dpo", "--model.pretrained", str(pipeline), "--train.batch-size", "1", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [card["gpu"] for card in found["cards"]] == list(GPUS)
    assert found["memory"]["weights"] == 4 * found["parameters"]["network"] == 4 * found["parameters"]["trained"]
    assert found["notes"][0].startswith("how many pairs embedded holds")


def test_wrong_input(capsys):
    assert "did you mean 'rtx-4090'" in fails(capsys, ["plan", "sd15-dpo", "--gpu", "rtx-4099"])
    assert "did you mean 'embedded-dpo'" in fails(capsys, ["plan", "embeded-dpo"])
    assert "plan needs a preset" in fails(capsys, ["plan"])
    assert "--pairs: many" in fails(capsys, ["plan", "sd15-dpo", "--pairs", "many"])
    assert "stable-diffusion-v1-5" in fails(
        capsys, ["plan", "sd15-dpo", "--model.pretrained", "stable-diffusion-v1-5/stable-diffusion-v1-6"]
    )
    assert "is no multiple" in fails(capsys, ["plan", "embedded-dpo", "--data.resolution", "33"])


def test_a_micro_batch_is_planned_as_a_batch_of_that_size(pipeline, tiny_pairs, tmp_path):
    whole = tiny_config(pipeline, tiny_pairs, tmp_path / "run", batch_size=4)
    parts = replace(whole, train=replace(whole.train, micro_batch=1))
    split = replace(whole, train=replace(whole.train, batch_size=1, gradient_accumulation_steps=4))
    planned, same, other = (make_plan(config, gpu("h100")).memory for config in (parts, split, whole))
    assert planned == same
    assert planned.peak < other.peak
