"""Qwen-Image: what text, latents and the transformer take, by diffusers' own pipeline; see test_families too."""

import json

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from support.families.qwenimage import make_qwenimage, make_transformer
from support.tiny import CPU, copy_of, write_json

from diffpref.errors import UserError
from diffpref.models import qwenimage
from diffpref.schedules import FlowSchedule
from diffpref.train.config import ModelConfig

PROMPTS = ["a large red circle", "", "a small blue {cross} on the left, grey background", "red " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny pipeline. Tests only read it."""
    return make_qwenimage(tmp_path_factory.mktemp("qwen") / "pipeline")


@pytest.fixture(scope="module")
def pipe(folder) -> QwenImagePipeline:
    """The folder as plain diffusers opens it."""
    return QwenImagePipeline.from_pretrained(folder)


def load(folder, trainable=False, weights=torch.float32, **model) -> qwenimage.QwenImage:
    return qwenimage.load(ModelConfig(pretrained=str(folder), **model), CPU, weights, trainable)


def points(backbone):
    x_t = torch.randn(4, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([3.0, 200.0, 500.5, 999.0]), backbone.encode_prompts(PROMPTS)


class TestText:
    def test_the_opening_has_the_tokens_that_are_cut_off(self, folder, pipe):
        assert pipe.prompt_template_encode == qwenimage.OPENING + "{}" + qwenimage.CLOSING
        assert pipe.prompt_template_encode_start_idx == qwenimage.OPENING_TOKENS
        assert len(load(folder).text.tokenizer(qwenimage.OPENING).input_ids) == qwenimage.OPENING_TOKENS

    @pytest.mark.parametrize("length", [0, 16])
    def test_it_is_what_the_plain_pipeline_computes_filled_up(self, folder, pipe, length):
        limit = length or 512
        with torch.no_grad():
            text, mask = pipe.encode_prompt(PROMPTS, max_sequence_length=limit)
        cond = load(folder, max_text_length=length).encode_prompts(PROMPTS)
        longest = text.shape[1]
        assert cond["text"].shape == (4, limit, 16) and cond["mask"].shape == (4, limit)
        torch.testing.assert_close(cond["text"][:, :longest], text)
        assert torch.equal(cond["mask"][:, :longest], mask.float())
        assert cond["text"][:, longest:].abs().sum() == cond["mask"][:, longest:].sum() == 0
        assert all(rows.dtype == torch.float32 for rows in cond.values())

    def test_a_row_does_not_depend_on_its_batch_or_on_the_side_that_is_filled(self, folder, tmp_path):
        changed = copy_of(folder, tmp_path / "p")
        file = changed / "tokenizer" / "tokenizer_config.json"
        write_json(file, {**json.loads(file.read_text()), "padding_side": "left"})
        together, left = (load(place, max_text_length=64).encode_prompts(PROMPTS) for place in (folder, changed))
        assert load(changed).text.tokenizer.padding_side == "left"
        torch.testing.assert_close(left, together, atol=1e-5, rtol=1e-5)
        for row, prompt in enumerate(PROMPTS):
            alone = load(folder, max_text_length=64).encode_prompts([prompt])
            torch.testing.assert_close(alone["text"][0], together["text"][row], atol=1e-5, rtol=1e-5)
            assert torch.equal(alone["mask"][0], together["mask"][row])

    def test_prompts_whose_ends_are_cut_are_told(self, folder):
        words = [" red" * count for count in (15, 16, 17)]
        assert load(folder, max_text_length=16).overlong(words) == {2}
        with pytest.raises(UserError, match=r"^model\.max_text_length: 1025 is above the 1024 of this family$"):
            load(folder, max_text_length=1025)

    def test_stored_text_belongs_to_its_length(self, folder):
        identities = [load(folder, max_text_length=length).identity() for length in (0, 512, 64)]
        assert identities[0] == identities[1] and identities[0]["text"] != identities[2]["text"]


class TestImages:
    def test_latents_are_standardized_by_channel_and_come_back(self, folder, pipe):
        backbone = load(folder)
        pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        mean, deviation = (
            torch.tensor(pipe.vae.config[name]).reshape(4, 1, 1) for name in ("latents_mean", "latents_std")
        )
        with torch.no_grad():
            latents = pipe.vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
            decoded = pipe.vae.decode(latents[:, :, None]).sample[:, :, 0]
        torch.testing.assert_close(backbone.encode_images(pixels), latents)
        scaled = backbone.scale_latents(latents)
        torch.testing.assert_close(scaled, (latents - mean) / deviation)
        expected = pipe.image_processor.postprocess(decoded, output_type="pt")
        torch.testing.assert_close(backbone.decode(scaled), expected, atol=1e-5, rtol=1e-5)

    def test_sides_must_be_whole_tokens(self, folder):
        backbone = load(folder)
        assert backbone.resolution == 512 and backbone.latent_shape(32, 16) == (4, 4, 8)  # 128 latents of 4 pixels
        with pytest.raises(UserError, match="resolution: 36 is no multiple of 8"):
            backbone.latent_shape(36, 32)


class TestTransformer:
    def test_predictions_are_those_of_the_plain_network(self, folder, pipe):
        backbone, net = (
            load(folder, max_text_length=24),
            QwenImageTransformer2DModel.from_pretrained(folder / "transformer"),
        )
        x_t, t, cond = points(backbone)
        with torch.no_grad():
            tokens = net(
                hidden_states=QwenImagePipeline._pack_latents(x_t, 4, 4, 8, 12),
                timestep=t / 1000,
                encoder_hidden_states=cond["text"],
                encoder_hidden_states_mask=cond["mask"].bool(),
                img_shapes=[[(1, 4, 6)]] * 4,
            ).sample
            expected = QwenImagePipeline._unpack_latents(tokens, 8, 12, 1)[:, :, 0]
            assert torch.equal(backbone.predict(x_t, t, cond), expected)

    def test_what_fills_a_row_up_changes_nothing(self, folder):
        backbone = load(folder, max_text_length=48)
        x_t, t, cond = points(backbone)
        filled = cond["text"] + 5 * (1 - cond["mask"])[..., None]
        short = {name: rows[:3, :20] for name, rows in cond.items()}
        with torch.no_grad():
            expected = backbone.predict(x_t, t, cond)
            torch.testing.assert_close(backbone.predict(x_t, t, {**cond, "text": filled}), expected)
            torch.testing.assert_close(backbone.predict(x_t[:3], t[:3], short), expected[:3])

    def test_its_times_are_not_shifted_in_training(self, folder):
        assert load(folder).schedule == FlowSchedule(1.0)

    @pytest.mark.parametrize("method", ["full", "adapters"])
    def test_what_the_last_block_makes_of_text_changes_nothing_and_does_not_train(self, folder, method):
        targets = ("add_q_proj", "to_add_out", "to_q")
        adapters = {"lora_rank": 2, "lora_targets": targets} if method == "adapters" else {}
        backbone = load(folder, trainable=True, max_text_length=24, **adapters)
        trains = {name: value.requires_grad for name, value in backbone.net.named_parameters()}
        parts = ("attn.add_q_proj.", "attn.norm_added_q.", "attn.to_add_out.", "txt_mlp.")
        idle = {name for name in trains if name.startswith(tuple(f"transformer_blocks.1.{part}" for part in parts))}
        usual = {name for name in trains if method == "full" or "lora_" in name}
        assert idle & usual and {name for name, yes in trains.items() if yes} == usual - idle
        at = points(backbone)
        before = backbone.predict(*at)
        for name, value in backbone.net.named_parameters():
            if name in idle:
                torch.nn.init.normal_(value)
        assert torch.equal(backbone.predict(*at), before)

    def test_parts_wait_until_they_are_used(self, folder):
        backbone = load(folder, trainable=True)
        assert "model" not in vars(backbone.vae) and not {"encoder", "tokenizer"} & set(vars(backbone.text))


class TestMisfits:
    def test_a_transformer_of_another_size_is_refused(self, folder, tmp_path):
        make_transformer(text_width=40).save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=r"takes text of width 40, but .*text_encoder gives 16"):
            load(folder, unet=str(tmp_path / "other"))

    def test_a_vae_of_other_channels_is_refused(self, folder, tmp_path):
        changed = copy_of(folder, tmp_path / "p")
        file = changed / "vae" / "config.json"
        write_json(file, {**json.loads(file.read_text()), "z_dim": 5})
        with pytest.raises(UserError, match=r"takes 4 channels, but .*vae gives 5"):
            load(changed)
