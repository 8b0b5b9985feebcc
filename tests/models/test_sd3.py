"""Stable Diffusion 3: what text, latents and the transformer are, by diffusers' own pipeline; see test_families too."""

import json

import diffusers
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from support.families.sd3 import make_sd3, make_transformer
from support.tiny import CPU, copy_of, write_json

from diffpref.errors import UserError
from diffpref.models import sd3
from diffpref.schedules import FlowSchedule
from diffpref.train.config import ModelConfig

PROMPTS = ["a large red circle", "", "a small blue cross on the left, grey background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny pipeline. Tests only read it."""
    return make_sd3(tmp_path_factory.mktemp("sd3") / "pipeline")


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory):
    """The same without its T5 encoder."""
    return make_sd3(tmp_path_factory.mktemp("sd3") / "pipeline", t5=False)


def load(folder, trainable=False, weights=torch.float32, **model) -> sd3.StableDiffusion3:
    return sd3.load(ModelConfig(pretrained=str(folder), **model), CPU, weights, trainable)


def plain(folder, **without) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(folder, **without)


class TestText:
    @pytest.mark.parametrize("length", [0, 16, 300])
    def test_it_is_what_the_plain_pipeline_computes(self, folder, length):
        tokens = length or 256
        with torch.no_grad():
            text, _, pooled, _ = plain(folder).encode_prompt(
                PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=tokens
            )
        cond = load(folder, max_text_length=length).encode_prompts(PROMPTS)
        torch.testing.assert_close(cond, {"text": text, "pooled": pooled})
        assert cond["text"].shape == (3, 16 + tokens, 32) and cond["pooled"].shape == (3, 20)

    def test_without_t5_zeros_stand_in_its_place(self, without_t5):
        pipe = plain(without_t5, text_encoder_3=None, tokenizer_3=None)
        text, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
        cond = load(without_t5).encode_prompts(PROMPTS)
        torch.testing.assert_close(cond, {"text": text, "pooled": pooled})
        assert cond["text"][:, 16:].abs().max() == 0

    def test_the_longest_encoder_says_what_is_too_long(self, folder, without_t5):
        prompts = ["red " * count for count in (13, 30, 62, 63, 64)]
        # CLIP reads 16 tokens here, of which two are its own; T5 as many as it is told to, of which one is its own
        assert load(folder, max_text_length=64).overlong(prompts) == {4}
        assert load(folder).overlong(prompts) == set()
        assert load(without_t5).overlong(prompts) == {1, 2, 3, 4}

    def test_t5_runs_in_the_dtype_of_its_checkpoint(self, folder, tmp_path):
        half = copy_of(folder, tmp_path / "p")
        file = half / "text_encoder_3" / "config.json"
        write_json(file, {**json.loads(file.read_text()), "dtype": "bfloat16"})
        backbone, cond = load(half, weights=torch.float16), load(half).encode_prompts(PROMPTS)
        assert backbone.t5.encoder.dtype == torch.bfloat16
        assert {clip.encoder.dtype for clip in backbone.clips} == {torch.float32}
        assert all(rows.dtype == torch.float32 for rows in cond.values())
        full = load(folder).encode_prompts(PROMPTS)["text"]
        assert 0 < (cond["text"] - full).norm() / full.norm() < 0.02

    def test_a_length_above_the_pipelines_is_refused(self, folder):
        with pytest.raises(UserError, match=r"^model\.max_text_length: 513 is above the 512 of this family$"):
            load(folder, max_text_length=513)

    def test_stored_text_belongs_to_its_length(self, folder, without_t5):
        identities = [load(folder, max_text_length=length).identity() for length in (0, 256, 64)]
        assert identities[0] == identities[1] and identities[0]["text"] != identities[2]["text"]
        assert load(without_t5).identity()["text"] != identities[0]["text"]


class TestImages:
    def test_latents_are_shifted_and_scaled_and_come_back(self, folder):
        backbone, pipe = load(folder), plain(folder)
        pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            mean = pipe.vae.encode(pixels).latent_dist.mean
            scaled = (mean - 0.06) * 1.5
            decoded = pipe.image_processor.postprocess(pipe.vae.decode(scaled / 1.5 + 0.06).sample, output_type="pt")
        torch.testing.assert_close(backbone.encode_images(pixels), mean)
        torch.testing.assert_close(backbone.scale_latents(mean), scaled)
        torch.testing.assert_close(backbone.decode(scaled), decoded)

    def test_sides_must_be_whole_tokens_and_within_the_positions(self, folder):
        backbone = load(folder)
        assert backbone.resolution == 32 and backbone.latent_shape(64, 32) == (4, 8, 16)
        with pytest.raises(UserError, match="resolution: 36 is no multiple of 8"):
            backbone.latent_shape(36, 36)
        with pytest.raises(UserError, match=r"^resolution: 72 is above this network's 64$"):
            backbone.latent_shape(8, 72)


class TestTransformer:
    def points(self, backbone):
        x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        return x_t, torch.tensor([3.0, 500.5, 999.0]), backbone.encode_prompts(PROMPTS)

    def test_predictions_are_those_of_the_plain_network(self, folder):
        backbone, net = load(folder), SD3Transformer2DModel.from_pretrained(folder / "transformer")
        x_t, t, cond = self.points(backbone)
        with torch.no_grad():
            expected = net(x_t, cond["text"], cond["pooled"], t).sample
            assert torch.equal(backbone.predict(x_t, t, cond), expected)

    def test_its_times_are_shifted_as_its_scheduler_says(self, folder):
        assert load(folder).schedule == FlowSchedule(3.0)

    @pytest.mark.parametrize("method", ["full", "adapters"])
    def test_the_text_queries_of_the_last_block_change_nothing_and_do_not_train(self, folder, method):
        adapters = {"lora_rank": 2, "lora_targets": ("add_q_proj", "to_q")} if method == "adapters" else {}
        backbone = load(folder, trainable=True, **adapters)
        trains = {name: value.requires_grad for name, value in backbone.net.named_parameters()}
        last = "transformer_blocks.2.attn."
        idle = {name for name in trains if name.startswith((f"{last}add_q_proj.", f"{last}norm_added_q."))}
        usual = {name for name in trains if method == "full" or "lora_" in name}
        assert idle & usual and {name for name, yes in trains.items() if yes} == usual - idle
        at = self.points(backbone)
        before = backbone.predict(*at)
        for name, value in backbone.net.named_parameters():
            if name in idle:
                torch.nn.init.normal_(value)
        assert torch.equal(backbone.predict(*at), before)

    def test_parts_wait_until_they_are_used(self, folder):
        backbone = load(folder, trainable=True)
        assert "model" not in vars(backbone.vae)
        assert not any({"encoder", "tokenizer"} & set(vars(part)) for part in (*backbone.clips, backbone.t5))


class TestMisfits:
    @pytest.mark.parametrize(
        ("widths", "told"),
        [
            ({"text_width": 40}, "takes text of width 40, but .*text_encoder_3 gives 32"),
            ({"pooled": 24}, "takes pooled text of width 24, but .*text_encoder and text_encoder_2 give 20"),
        ],
    )
    def test_a_transformer_of_another_size_is_refused(self, folder, tmp_path, widths, told):
        make_transformer(**widths).save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=told) as error:
            load(folder, unet=str(tmp_path / "other"))
        assert "\n" not in str(error.value)

    def test_text_wider_than_the_transformer_is_refused(self, without_t5, tmp_path):
        make_transformer(text_width=16).save_pretrained(tmp_path / "narrow")
        with pytest.raises(UserError, match=r"takes text of width 16, but .*text_encoder and text_encoder_2 give 20"):
            load(without_t5, unet=str(tmp_path / "narrow"))

    def test_a_vae_of_another_family_is_refused(self, folder, tmp_path):
        diffusers.AutoencoderKL(latent_channels=3, block_out_channels=(32,)).save_pretrained(tmp_path / "vae")
        with pytest.raises(UserError, match=r"takes 4 channels, but .*vae gives 3"):
            load(folder, vae=str(tmp_path / "vae"))

    def test_a_scheduler_that_is_no_flow_is_refused(self, folder, tmp_path):
        changed = copy_of(folder, tmp_path / "p")
        diffusers.EulerDiscreteScheduler().save_pretrained(changed / "scheduler")
        with pytest.raises(
            UserError, match="scheduler is a EulerDiscreteScheduler, but this family is a rectified flow"
        ):
            load(changed)

    @pytest.mark.parametrize("part", ["text_encoder_2", "text_encoder_3", "tokenizer_3", "transformer", "scheduler"])
    def test_a_missing_part_is_named(self, folder, tmp_path, part):
        broken = copy_of(folder, tmp_path / "p")
        (broken / part).rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=f"^{broken} has no {part}/ folder "):
            load(broken)
