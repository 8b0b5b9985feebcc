"""LoRA: only the adapters train, what is saved opens elsewhere, and wrong files and layers are named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, MODEL
from support.tiny import copy_of, learn, load, open_plain, points, predict

from diffpref.errors import UserError
from diffpref.models.loading import load_backbone
from diffpref.models.lora import add_lora
from diffpref.train.config import ModelConfig


def test_only_the_adapters_train_and_in_fp32(pipeline):
    backbone = load(pipeline, trainable=True, weights=torch.bfloat16, lora_rank=2)
    trained = {name: p for name, p in backbone.net.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    frozen = {name: p for name, p in backbone.net.named_parameters() if not p.requires_grad}
    assert all("lora_" not in name and p.dtype == torch.bfloat16 for name, p in frozen.items())
    layers = {name.split(".lora_")[0].split("attn")[1][2:] for name in trained}
    assert layers == {"to_q", "to_k", "to_v", "to_out.0"}
    assert {p.shape[0] for name, p in trained.items() if "lora_A" in name} == {2}


def test_it_starts_as_the_base_and_training_leaves_the_base_alone(pipeline):
    base, backbone = load(pipeline), load(pipeline, trainable=True, lora_rank=2)
    at = points(base)
    torch.testing.assert_close(predict(backbone, at), predict(base, at))
    learn(backbone)
    assert (predict(backbone, at) - predict(base, at)).abs().max() > 1e-3
    state = {name.replace(".base_layer", ""): v for name, v in backbone.net.state_dict().items() if "lora" not in name}
    assert all(torch.equal(value, state[name]) for name, value in base.net.state_dict().items())


@pytest.mark.parametrize("alpha", [None, 1, 8])
def test_what_is_saved_opens_elsewhere_and_predicts_the_same(pipeline, tmp_path, alpha):
    backbone = load(pipeline, trainable=True, lora_rank=4, lora_alpha=alpha)
    learn(backbone)
    backbone.save(tmp_path, lora=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["comfyui_lora.safetensors", "pytorch_lora_weights.safetensors"]
    at = points(backbone)
    expected = predict(backbone, at).detach()
    plain = open_plain(pipeline)
    plain.load_lora_weights(tmp_path)
    with torch.no_grad():
        theirs = plain.unet(at.x_t, at.t, at.cond["text"]).sample
    torch.testing.assert_close(theirs, expected, atol=1e-6, rtol=1e-5)
    for place in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        fused = load(pipeline, lora=(str(place),))
        torch.testing.assert_close(predict(fused, at), expected, atol=1e-6, rtol=1e-5)
        assert not any("lora" in name for name in fused.net.state_dict())
    assert (expected - predict(load(pipeline), at)).abs().max() > 1e-3


def test_alpha_is_a_scale_over_the_rank(pipeline):
    torch.manual_seed(0)
    weak = load(pipeline, trainable=True, lora_rank=4)
    torch.manual_seed(0)
    strong = load(pipeline, trainable=True, lora_rank=4, lora_alpha=8)
    at, base = points(weak), load(pipeline)
    for backbone in (weak, strong):
        for name, parameter in backbone.net.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 1e-4)
    moved = [(predict(backbone, at) - predict(base, at)).detach().norm() for backbone in (weak, strong)]
    assert (moved[1] / moved[0]).item() == pytest.approx(2, rel=0.02)


def test_a_fused_model_trains_on_and_saves_as_a_whole(pipeline, tmp_path):
    first = load(pipeline, trainable=True, lora_rank=2)
    learn(first)
    first.save(tmp_path / "lora", lora=True)
    fused = load(pipeline, lora=(str(tmp_path / "lora"),), trainable=True)
    assert all(p.requires_grad for p in fused.net.parameters())
    fused.save(tmp_path / "whole", lora=False)
    at = points(first)
    torch.testing.assert_close(predict(load(tmp_path / "whole"), at), predict(first, at), atol=1e-6, rtol=1e-5)
    again = load(pipeline, lora=(str(tmp_path / "lora"),), trainable=True, lora_rank=3)
    learn(again)
    again.save(tmp_path / "second", lora=True)
    opened = load(tmp_path / "whole", lora=(str(tmp_path / "second"),))
    torch.testing.assert_close(predict(opened, at), predict(again, at), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("scales", "factors"), [((), (1, 1)), ((0.5, -2.0), (0.5, -2))])
def test_several_are_added_up_with_their_scales(pipeline, tmp_path, scales, factors):
    base, places = load(pipeline).net.state_dict(), []
    for number in range(2):
        torch.manual_seed(number)
        backbone = load(pipeline, trainable=True, lora_rank=2)
        learn(backbone)
        places.append(str(tmp_path / str(number)))
        backbone.save(Path(places[-1]), lora=True)
    alone = [load(pipeline, lora=(place,)).net.state_dict() for place in places]
    both = load(pipeline, lora=tuple(places), lora_scales=scales).net.state_dict()
    moved = 0
    for name, value in base.items():
        steps = [factor * (one[name] - value) for factor, one in zip(factors, alone, strict=True)]
        torch.testing.assert_close(both[name], value + sum(steps), atol=1e-6, rtol=1e-5)
        moved += sum(bool(step.abs().max() > 1e-4) for step in steps)
    assert moved > 2


@pytest.fixture
def emptied(pipeline, tmp_path) -> Path:
    """The pipeline without any weights: what is refused there is refused before weights are loaded."""
    folder = copy_of(pipeline, tmp_path / "emptied")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize(
    ("targets", "nearest"), [(("to_q", "to_kk"), "did you mean 'to_k'"), (("to_out.1000",), "did you mean 'to_out")]
)
def test_a_layer_that_is_not_there_is_refused(emptied, targets, nearest):
    with pytest.raises(UserError, match=rf"model\.lora_targets: no layer is called '{targets[-1]}': {nearest}"):
        load(emptied, trainable=True, lora_rank=2, lora_targets=targets)


def test_a_layer_that_takes_no_adapter_is_refused(emptied):
    with pytest.raises(UserError, match=r"model\.lora_targets: Target module .*Norm"):
        load(emptied, trainable=True, lora_rank=2, lora_targets=("norm1",))


def test_the_trial_leaves_the_first_values_alone(pipeline):
    """They are those of adapters put on the network alone, without the sketch."""
    torch.manual_seed(0)
    backbone, plain = load(pipeline, trainable=True, lora_rank=2), load(pipeline)
    torch.manual_seed(0)
    add_lora(plain.net, ModelConfig(lora_rank=2))
    state = plain.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in backbone.net.state_dict().items())


def test_wrong_lora_files_are_named(pipeline, tmp_path):
    with pytest.raises(UserError, match=r"model\.lora: .*pytorch_lora_weights\.safetensors is not there"):
        load(pipeline, lora=(str(tmp_path),))
    file = tmp_path / "broken.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.lora: .*broken\.safetensors does not fit") as error:
        load(pipeline, lora=(str(file),))
    assert "\n" not in str(error.value)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"broken\.safetensors holds no LoRA layers of a U-Net"):
        load(pipeline, lora=(str(file),))


def test_a_lora_of_another_width_is_refused(pipeline, tmp_path):
    backbone = load(pipeline, trainable=True, lora_rank=2)
    backbone.save(tmp_path, lora=True)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({name: torch.cat([value, value], dim=1) for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match="does not fit this U-Net") as error:
        load(pipeline, lora=(str(tmp_path),))
    assert "\n" not in str(error.value)


def in_kohyas_names(file: Path, alpha: float) -> dict[str, torch.Tensor]:
    """LoRA weights under the names of kohya's trainer, as most published files have them, with each layer's alpha."""
    renamed = {}
    for name, value in load_file(file).items():
        layer, kind = name.removeprefix("unet.").removesuffix(".weight").rsplit(".lora.", 1)
        key = f"lora_unet_{layer.replace('.', '_')}"
        rank = value.shape[0] if kind == "down" else value.shape[1]
        renamed[f"{key}.lora_{kind}.weight"] = value if kind == "down" else value * rank / alpha
        renamed[f"{key}.alpha"] = torch.tensor(alpha)
    return renamed


def test_published_files_in_kohyas_names_are_read_with_their_alpha(pipeline, tmp_path, caplog):
    backbone = load(pipeline, trainable=True, lora_rank=4)
    learn(backbone)
    backbone.save(tmp_path, lora=True)
    layers = in_kohyas_names(tmp_path / "pytorch_lora_weights.safetensors", alpha=2.0)
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    for added in ({}, {f"{text}.lora_down.weight": torch.ones(4, 16), f"{text}.lora_up.weight": torch.ones(16, 4)}):
        save_file({**layers, **added}, tmp_path / "kohya.safetensors")
        caplog.clear()
        opened = load(pipeline, lora=(str(tmp_path / "kohya.safetensors"),))
        at = points(backbone)
        torch.testing.assert_close(predict(opened, at), predict(backbone, at), atol=2e-6, rtol=1e-5)
        told = [record.message for record in caplog.records if record.name == "diffpref"]
        assert len(told) == (1 if added else 0)
        assert not added or "tensors are not the U-Net's and are not used" in told[0]


def comfyui_names(config) -> dict[str, str]:
    """LoRA names of a U-Net's layers that ComfyUI knows -> the layer in its own network (blocks counted through).

    Derived anew from the structure, as ComfyUI counts it: input_blocks.0 is the first convolution, then each level has
    `layers_per_block` blocks and a downsampler; output_blocks have one block more a level and no block of their own for
    the upsampler.
    """
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    places = {"mid_block.attentions.0": "middle_block.1"}
    places |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for level in range(levels):
        for i in range(layers):
            first = 1 + level * (layers + 1)
            places[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{first + i}.0"
            places[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{first + i}.1"
        for i in range(layers + 1):
            first = level * (layers + 1)
            places[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{first + i}.0"
            places[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{first + i}.1"
    projections = [f"attn{n}.{to}" for n in (1, 2) for to in ("to_q", "to_k", "to_v", "to_out.0")]
    inner = [*projections, "ff.net.0.proj", "ff.net.2"]
    known = {}
    for place, comfy in places.items():
        if "attentions" in place:
            found = {name: name for name in ("proj_in", "proj_out")}
            found |= {
                f"transformer_blocks.{d}.{name}": f"transformer_blocks.{d}.{name}" for d in range(9) for name in inner
            }
        else:
            found = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
            found |= {"conv_shortcut": "skip_connection"}
        known |= {f"{place}.{name}": f"{comfy}.{theirs}" for name, theirs in found.items()}
    return {f"lora_unet_{name.replace('.', '_')}": theirs for name, theirs in known.items()}


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl", "sdxl-refiner"])
def test_comfyui_knows_every_layer_and_adds_what_was_trained(family, tmp_path):
    folder = FAMILIES[family](tmp_path / "pipeline")
    targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj")
    model = {
        "pretrained": str(folder),
        "lora_rank": 2,
        "lora_alpha": 6,
        "lora_targets": targets,
        **MODEL.get(family, {}),
    }
    backbone = load_backbone(ModelConfig(**model), torch.device("cpu"), torch.float32, trainable=True)
    for name, value in backbone.net.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.1)
    backbone.save(tmp_path / "final", lora=True)
    file = load_file(tmp_path / "final" / "comfyui_lora.safetensors")
    known = comfyui_names(backbone.net.config)
    layers = {key.split(".")[0] for key in file}
    assert set(file) == {f"{x}.{end}" for x in layers for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert layers <= set(known) and len({known[layer] for layer in layers}) == len(layers)
    net = backbone.net
    net.disable_adapters()
    for name, module in net.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer = f"lora_unet_{name.replace('.', '_')}"
        up, down, alpha = (file[f"{layer}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        # what ComfyUI's LoRAAdapter.calculate_weight adds to the weight
        added = (alpha.item() / down.shape[0]) * (up.flatten(1) @ down.flatten(1)).reshape(
            module.base_layer.weight.shape
        )
        torch.testing.assert_close(added, module.get_delta_weight("default"), atol=1e-6, rtol=1e-5)
        assert added.abs().max() > 1e-3
        layers.remove(layer)
    assert not layers


@pytest.mark.parametrize("family", ["sd3", "flux-dev", "qwenimage"])
def test_comfyui_reads_transformers_as_diffusers_writes_them(family, tmp_path):
    """`transformer.NAME.lora_A.weight` and `.lora_B.weight` without alpha, which ComfyUI takes as a factor of 1."""
    folder = FAMILIES[family](tmp_path / "pipeline")
    model = ModelConfig(pretrained=str(folder), lora_rank=2, lora_alpha=6, **MODEL.get(family, {}))
    backbone = load_backbone(model, torch.device("cpu"), torch.float32, trainable=True)
    for name, value in backbone.net.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.1)
    backbone.save(tmp_path / "final", lora=True)
    file = load_file(tmp_path / "final" / "comfyui_lora.safetensors")
    for name, module in backbone.net.named_modules():
        if hasattr(module, "lora_A"):
            down, up = (file.pop(f"transformer.{name}.lora_{side}.weight") for side in "AB")
            torch.testing.assert_close(up @ down, module.get_delta_weight("default"), atol=1e-6, rtol=1e-5)
    assert not file
