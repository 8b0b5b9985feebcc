"""FLUX.1: what text, tokens and the transformer's inputs are, by diffusers' own pipeline; see test_families too."""

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from support.families.flux import make_flux, make_schnell, make_transformer
from support.tiny import CPU, copy_of

from diffpref.errors import UserError
from diffpref.models import flux
from diffpref.models.flow import even_sigmas, pack, unpack
from diffpref.schedules import FlowSchedule
from diffpref.train.config import ModelConfig

PROMPTS = ["a large red circle", "", "a small blue cross on the left, grey background"]


@pytest.fixture(scope="module", params=["dev", "schnell"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    """The tiny pipeline of either kind. Tests only read it."""
    make = make_flux if kind == "dev" else make_schnell
    return make(tmp_path_factory.mktemp("flux") / "pipeline")


def load(folder, trainable=False, weights=torch.float32, **model) -> flux.Flux:
    return flux.load(ModelConfig(pretrained=str(folder), **model), CPU, weights, trainable)


def points(backbone, h: int = 8, w: int = 8):
    x_t = torch.randn(3, 4, h, w, generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([3.0, 500.5, 999.0]), backbone.encode_prompts(PROMPTS)


def their_prediction(folder, x_t, t, cond, guidance: float | None) -> torch.Tensor:
    """The plain transformer's, fed as FluxPipeline feeds it; unpacked."""
    net = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    rows, channels, h, w = x_t.shape
    with torch.no_grad():
        tokens = net(
            hidden_states=FluxPipeline._pack_latents(x_t, rows, channels, h, w),
            timestep=t / 1000,
            guidance=None if guidance is None else torch.full((rows,), guidance),
            pooled_projections=cond["pooled"],
            encoder_hidden_states=cond["text"],
            txt_ids=torch.zeros(cond["text"].shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(rows, h // 2, w // 2, "cpu", torch.float32),
        ).sample
    return FluxPipeline._unpack_latents(tokens, h, w, 1)


class TestTokens:
    def test_they_are_packed_as_the_plain_pipeline_packs_them(self):
        latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
        assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 4, 8, 6))
        assert torch.equal(unpack(pack(latents), 8, 6), latents)

    def test_a_token_by_hand(self):
        # two channels of 2 x 4: the second token holds columns 2 and 3, channel by channel
        latents = torch.arange(16.0).reshape(1, 2, 2, 4)
        assert pack(latents)[0, 1].tolist() == [2, 3, 6, 7, 10, 11, 14, 15]

    def test_noise_levels_fall_evenly_from_one(self):
        assert even_sigmas(4) == [1.0, 0.75, 0.5, 0.25]


class TestText:
    @pytest.mark.parametrize("length", [0, 16])
    def test_it_is_what_the_plain_pipeline_computes(self, folder, kind, length):
        tokens = length or (512 if kind == "dev" else 256)
        with torch.no_grad():
            pipe = FluxPipeline.from_pretrained(folder)
            text, pooled, _ = pipe.encode_prompt(PROMPTS, max_sequence_length=tokens)
        cond = load(folder, max_text_length=length).encode_prompts(PROMPTS)
        torch.testing.assert_close(cond, {"text": text, "pooled": pooled})
        assert cond["text"].shape == (3, tokens, 24) and cond["pooled"].shape == (3, 8)

    def test_t5_says_what_is_too_long(self, folder, kind):
        prompts = ["red " * count for count in (20, 255, 256, 511, 512)]
        assert load(folder).overlong(prompts) == ({4} if kind == "dev" else {2, 3, 4})
        assert load(folder, max_text_length=16).overlong(prompts) == {0, 1, 2, 3, 4}

    def test_a_length_above_the_pipelines_is_refused(self, folder):
        with pytest.raises(UserError, match=r"^model\.max_text_length: 513 is above the 512 of this family$"):
            load(folder, max_text_length=513)


class TestTransformer:
    def test_predictions_are_those_of_the_plain_network(self, folder, kind):
        for guidance in (1.0, 3.5) if kind == "dev" else (1.0,):
            backbone = load(folder, max_text_length=16, guidance_embedding=guidance)
            for at in (points(backbone), points(backbone, 4, 12)):
                expected = their_prediction(folder, *at, guidance if kind == "dev" else None)
                with torch.no_grad():
                    assert torch.equal(backbone.predict(*at), expected)

    def test_the_guidance_scale_is_an_input_of_dev_alone(self, folder, kind):
        backbone = load(folder, max_text_length=16)
        other = backbone.with_guidance(4.0)
        at = points(backbone)
        with torch.no_grad():
            apart = (other.predict(*at) - backbone.predict(*at)).abs().max()
        assert backbone.embeds_guidance == (kind == "dev")
        if kind == "dev":
            assert backbone.guidance == 1.0 and other.guidance == 4.0 and other.net is backbone.net and apart > 1e-4
        else:
            assert other is backbone

    def test_a_copy_keeps_the_guidance_scale(self, folder):
        if not load(folder).embeds_guidance:
            with pytest.raises(UserError, match=r"model\.guidance_embedding: .* takes no guidance scale"):
                load(folder, guidance_embedding=3.5)
            return
        backbone = load(folder, max_text_length=16, guidance_embedding=3.5)
        assert backbone.with_net(backbone.net).guidance == 3.5

    def test_its_times_are_not_shifted_in_training(self, folder):
        assert load(folder).schedule == FlowSchedule(1.0)

    def test_every_parameter_takes_part(self, folder):
        backbone = load(folder, trainable=True, max_text_length=16)
        backbone.predict(*points(backbone)).square().mean().backward()
        assert all(value.requires_grad and value.grad.abs().max() > 0 for value in backbone.net.parameters())

    def test_bf16_with_adapters_trains_under_autocast(self, folder):
        backbone = load(folder, trainable=True, weights=torch.bfloat16, max_text_length=16, lora_rank=2)
        base, at = load(folder, weights=torch.bfloat16, max_text_length=16), points(backbone)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(backbone.predict(*at), base.predict(*at))
            backbone.predict(*at).float().square().mean().backward()
        trained = [value for value in backbone.net.parameters() if value.requires_grad]
        assert trained and all(value.dtype == value.grad.dtype == torch.float32 for value in trained)
        assert sum(value.grad.abs().sum() for value in trained) > 0

    def test_sides_must_be_whole_tokens(self, folder):
        backbone = load(folder)
        assert backbone.resolution == 512 and backbone.latent_shape(32, 16) == (4, 4, 8)  # 128 latents of 4 pixels
        with pytest.raises(UserError, match="resolution: 36 is no multiple of 8"):
            backbone.latent_shape(32, 36)

    def test_parts_wait_until_they_are_used(self, folder):
        backbone = load(folder, trainable=True)
        assert "model" not in vars(backbone.vae)
        assert not any({"encoder", "tokenizer"} & set(vars(part)) for part in (backbone.clip, backbone.t5))


class TestMisfits:
    @pytest.mark.parametrize(
        ("widths", "told"),
        [
            ({"text_width": 40}, "takes text of width 40, but .*text_encoder_2 gives 24"),
            ({"pooled": 24}, "takes pooled text of width 24, but .*text_encoder gives 8"),
        ],
    )
    def test_a_transformer_of_another_size_is_refused(self, folder, tmp_path, widths, told):
        make_transformer(**widths).save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=told) as error:
            load(folder, unet=str(tmp_path / "other"))
        assert "\n" not in str(error.value)

    def test_a_vae_of_another_family_is_refused(self, folder, tmp_path):
        diffusers.AutoencoderKL(latent_channels=3, block_out_channels=(32,)).save_pretrained(tmp_path / "vae")
        with pytest.raises(UserError, match=r"takes 4 channels, but .*vae gives 3"):
            load(folder, vae=str(tmp_path / "vae"))

    def test_a_scheduler_that_is_no_flow_is_refused(self, folder, tmp_path):
        changed = copy_of(folder, tmp_path / "p")
        diffusers.EulerDiscreteScheduler().save_pretrained(changed / "scheduler")
        with pytest.raises(UserError, match="scheduler is a EulerDiscreteScheduler, but this family is a rectified"):
            load(changed)
