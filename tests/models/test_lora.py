"""LoRA: only the adapters train, what is saved opens elsewhere, and wrong files and layers are named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import learn, load, open_plain, points, predict

from diffpref.errors import UserError


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
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    at = points(backbone)
    expected = predict(backbone, at).detach()
    plain = open_plain(pipeline)
    plain.load_lora_weights(tmp_path)
    with torch.no_grad():
        theirs = plain.unet(at.x_t, at.t, at.cond["text"]).sample
    torch.testing.assert_close(theirs, expected, atol=1e-6, rtol=1e-5)
    for place in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        fused = load(pipeline, lora=str(place))
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
    fused = load(pipeline, lora=str(tmp_path / "lora"), trainable=True)
    assert all(p.requires_grad for p in fused.net.parameters())
    fused.save(tmp_path / "whole", lora=False)
    at = points(first)
    torch.testing.assert_close(predict(load(tmp_path / "whole"), at), predict(first, at), atol=1e-6, rtol=1e-5)
    again = load(pipeline, lora=str(tmp_path / "lora"), trainable=True, lora_rank=3)
    learn(again)
    again.save(tmp_path / "second", lora=True)
    opened = load(tmp_path / "whole", lora=str(tmp_path / "second"))
    torch.testing.assert_close(predict(opened, at), predict(again, at), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("targets", "nearest"), [(("to_q", "to_kk"), "did you mean 'to_k'"), (("to_out.1000",), "did you mean 'to_out")]
)
def test_a_layer_that_is_not_there_is_refused(pipeline, targets, nearest):
    with pytest.raises(UserError, match=rf"model\.lora_targets: no layer is called '{targets[-1]}': {nearest}"):
        load(pipeline, trainable=True, lora_rank=2, lora_targets=targets)


def test_a_layer_that_takes_no_adapter_is_refused(pipeline):
    with pytest.raises(UserError, match=r"model\.lora_targets: Target module .*Norm"):
        load(pipeline, trainable=True, lora_rank=2, lora_targets=("norm1",))


def test_wrong_lora_files_are_named(pipeline, tmp_path):
    with pytest.raises(UserError, match=r"model\.lora: .*pytorch_lora_weights\.safetensors is not there"):
        load(pipeline, lora=str(tmp_path))
    file = tmp_path / "broken.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.lora: .*broken\.safetensors does not fit") as error:
        load(pipeline, lora=str(file))
    assert "\n" not in str(error.value)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"broken\.safetensors holds no LoRA layers of a U-Net"):
        load(pipeline, lora=str(file))


def test_a_lora_of_another_width_is_refused(pipeline, tmp_path):
    backbone = load(pipeline, trainable=True, lora_rank=2)
    backbone.save(tmp_path, lora=True)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({name: torch.cat([value, value], dim=1) for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match="does not fit this U-Net") as error:
        load(pipeline, lora=str(tmp_path))
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
        opened = load(pipeline, lora=str(tmp_path / "kohya.safetensors"))
        at = points(backbone)
        torch.testing.assert_close(predict(opened, at), predict(backbone, at), atol=2e-6, rtol=1e-5)
        told = [record.message for record in caplog.records if record.name == "diffpref"]
        assert len(told) == (1 if added else 0)
        assert not added or "tensors are not the U-Net's and are not used" in told[0]
