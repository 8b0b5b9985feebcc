"""SDXL folders: base, turbo and refiner are conditioned, timed and sampled as diffusers and the published script do."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families.sdxl import make_refiner, make_sdxl, make_turbo, make_unet
from support.tiny import PROMPTS, copy_of, make_vae, write_json
from support.tiny import make_unet as make_plain_unet

from diffpref.draws import generator
from diffpref.errors import UserError
from diffpref.models.loading import check_variant, load_backbone
from diffpref.models.sdxl import StableDiffusionXL
from diffpref.sampling import Sampling, sample, scheduler_of
from diffpref.train.check import check
from diffpref.train.config import Config, ModelConfig, ValidationConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def turbo(tmp_path_factory) -> Path:
    return make_turbo(tmp_path_factory.mktemp("sdxl") / "turbo")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory) -> Path:
    return make_refiner(tmp_path_factory.mktemp("sdxl") / "refiner")


def load(folder: Path, weights: torch.dtype = torch.float32, **model: Any) -> StableDiffusionXL:
    found = load_backbone(ModelConfig(pretrained=str(folder), **model), CPU, weights, trainable=False)
    assert isinstance(found, StableDiffusionXL)
    return found


def opened(folder: Path) -> Any:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edited(source: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a folder with keys of one JSON file changed; None takes a key out."""
    changed = copy_of(source, target)
    content = json.loads((changed / file).read_text()) | changes
    write_json(changed / file, {key: value for key, value in content.items() if value is not None})
    return changed


def refused(folder: Path, **model: Any) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(UserError) as error:
        load(folder, **model)
    assert "\n" not in str(error.value)
    return str(error.value)


def noisy(rows: int = 3, side: int = 8) -> torch.Tensor:
    return torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(1))


class TestText:
    def test_both_encoders_side_by_side_and_the_seconds_pooled_text(self, base):
        text, zeros, pooled, zeros_pooled = opened(base).encode_prompt(PROMPTS, device="cpu")
        backbone = load(base)
        torch.testing.assert_close(backbone.encode_prompts(PROMPTS), {"text": text, "pooled": pooled})
        unconditional = backbone.encode_unconditional(3)
        torch.testing.assert_close(unconditional, {"text": zeros, "pooled": zeros_pooled})
        assert not any(rows.any() for rows in unconditional.values())

    def test_an_empty_prompt_is_encoded_and_not_zero(self, base):
        """The published script trains dropped prompts so; zeros are for guidance's unconditional branch alone."""
        empty = load(base).encode_prompts([""])
        text, _, pooled, _ = opened(base).encode_prompt("", device="cpu")
        torch.testing.assert_close(empty, {"text": text, "pooled": pooled})
        assert all(rows.abs().max() > 0.1 for rows in empty.values())

    def test_without_forced_zeros_the_unconditional_branch_sees_the_empty_prompt(self, base, tmp_path):
        changed = edited(base, tmp_path / "p", "model_index.json", force_zeros_for_empty_prompt=False)
        _, text, _, pooled = opened(changed).encode_prompt(PROMPTS, device="cpu")
        torch.testing.assert_close(load(changed).encode_unconditional(3), {"text": text, "pooled": pooled})

    def test_the_refiner_reads_its_one_encoder(self, refiner):
        text, negative, pooled, negative_pooled = opened(refiner).encode_prompt(PROMPTS, device="cpu")
        backbone = load(refiner, variant="refiner")
        torch.testing.assert_close(backbone.encode_prompts(PROMPTS), {"text": text, "pooled": pooled})
        torch.testing.assert_close(backbone.encode_unconditional(3), {"text": negative, "pooled": negative_pooled})

    def test_a_prompt_that_one_of_the_encoders_cuts_counts_once(self, base):
        backbone = load(base)
        prompts = ["red", "red " * 14, "red " * 15, "red " * 40]
        assert backbone.overlong(prompts) == {2, 3}  # 16 tokens, of which two are the ends
        backbone.texts[1].tokenizer.model_max_length = 10
        assert backbone.overlong(prompts) == {1, 2, 3}

    def test_identity_covers_both_encoders_and_tokenizers(self, base, tmp_path):
        changed = copy_of(base, tmp_path / "p")
        seen = [load(changed).identity()["text"]]
        assert seen == [load(base).identity()["text"]]
        for part in ("text_encoder", "text_encoder_2"):
            state = load_file(changed / part / "model.safetensors")
            state[sorted(state)[0]].view(-1)[0] += 1e-3
            save_file(state, changed / part / "model.safetensors", metadata={"format": "pt"})
            seen.append(load(changed).identity()["text"])
        for part in ("tokenizer", "tokenizer_2"):
            (changed / part / "more.txt").touch()
            seen.append(load(changed).identity()["text"])
        assert len(set(seen)) == 5


class TestPrediction:
    def test_time_ids_are_the_size_uncropped(self, base, monkeypatch):
        backbone, pipe = load(base), opened(base)
        x_t, t, cond = noisy(), torch.tensor([10, 500, 990]), backbone.encode_prompts(PROMPTS)
        ids = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 12).repeat(3, 1)
        assert ids.tolist() == [[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]] * 3
        added = {"text_embeds": cond["pooled"], "time_ids": ids}
        with torch.no_grad():
            expected = pipe.unet(x_t, t, cond["text"], added_cond_kwargs=added).sample
            assert torch.equal(backbone.predict(x_t, t, cond), expected)
            other = pipe.unet(x_t, t, cond["text"], added_cond_kwargs={**added, "time_ids": ids * 2}).sample
        assert (other - expected).abs().max() > 1e-4

    def test_time_ids_follow_the_latents(self, base):
        backbone = load(base)
        assert backbone._time_ids(noisy(2, 16)).tolist() == [[64, 64, 0, 0, 64, 64]] * 2
        expected = opened(base)._get_add_time_ids((32, 64), (0, 0), (32, 64), torch.float32, 12)  # height comes first
        assert backbone._time_ids(torch.zeros(1, 4, 8, 16)).tolist() == expected.tolist() == [[32, 64, 0, 0, 32, 64]]

    def test_the_refiners_end_with_the_aesthetic_score(self, refiner):
        backbone, pipe = load(refiner, variant="refiner"), opened(refiner)
        x_t, t, cond = noisy(), torch.tensor([10, 50, 190]), backbone.encode_prompts(PROMPTS)
        defaults = inspect.signature(pipe.__call__).parameters
        score, worse = (defaults[name].default for name in ("aesthetic_score", "negative_aesthetic_score"))
        size = ((32, 32), (0, 0), (32, 32))
        ids, _ = pipe._get_add_time_ids(*size, score, worse, *size, torch.float32, 12)
        assert ids.tolist() == [[32.0, 32.0, 0.0, 0.0, 6.0]]
        added = {"text_embeds": cond["pooled"], "time_ids": ids.repeat(3, 1)}
        with torch.no_grad():
            expected = pipe.unet(x_t, t, cond["text"], added_cond_kwargs=added).sample
            assert torch.equal(backbone.predict(x_t, t, cond), expected)

    def test_bf16_weights_predict_nearly_the_same_with_time_ids_in_full(self, base):
        full, half = load(base), load(base, torch.bfloat16)
        cond, t = full.encode_prompts(PROMPTS), torch.tensor([10, 500, 990])
        with torch.no_grad():
            exact, low = full.predict(noisy(), t, cond), half.predict(noisy(), t, cond)
        assert low.dtype == torch.bfloat16 and half._time_ids(noisy()).dtype == torch.float32
        assert (low.float() - exact).norm() / exact.norm() < 0.05

    @pytest.mark.parametrize("guidance", [1.0, 5.0])
    @pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
    def test_samples_are_those_of_the_plain_pipeline(self, base, sampler, guidance):
        backbone, pipe = load(base), opened(base)
        scheduler = scheduler_of(sampler, backbone.scheduler_config)
        pipe.scheduler = type(scheduler).from_config(pipe.scheduler.config)
        found = sample(backbone, scheduler, PROMPTS, [3, 4, 5], 32, Sampling(sampler, 4, guidance))
        for place, prompt in enumerate(PROMPTS):
            drawn = torch.Generator().manual_seed(3 + place)
            how: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": guidance, "height": 32, "width": 32}
            expected = pipe(prompt, generator=drawn, output_type="latent", **how).images
            torch.testing.assert_close(found[place : place + 1], expected, atol=2e-5, rtol=1e-5)


class TestVae:
    def test_per_channel_moments_are_honoured(self, base, tmp_path):
        """As fine-tunes of SDXL with another latent space have them."""
        moments = {"latents_mean": [0.5, -1.0, 0.25, 0.0], "latents_std": [2.0, 0.5, 1.0, 4.0]}
        changed = edited(base, tmp_path / "p", "vae/config.json", **moments)
        backbone, pipe, latents = load(changed), opened(changed), noisy(2)
        scaled = backbone.scale_latents(latents)
        assert scaled[1, 3, 2, 2] == pytest.approx((latents[1, 3, 2, 2].item() - 0.0) * 0.6 / 4.0, rel=1e-6)
        assert scaled[0, 1, 5, 0] == pytest.approx((latents[0, 1, 5, 0].item() + 1.0) * 0.6 / 0.5, rel=1e-6)
        with torch.no_grad():
            expected = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pt")
        torch.testing.assert_close(backbone.decode(scaled), expected, atol=1e-5, rtol=1e-5)
        how: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        drawn = sample(backbone, pipe.scheduler, ["red"], [1], 32, Sampling("ddim", 2, 1.0))
        image = pipe("red", generator=torch.Generator().manual_seed(1), output_type="pt", **how).images
        torch.testing.assert_close(backbone.decode(drawn), image, atol=1e-5, rtol=1e-5)

    def test_another_vae_in_fp32(self, base, tmp_path):
        make_vae(scaling_factor=0.25).half().save_pretrained(tmp_path / "vae")
        backbone = load(base, torch.bfloat16, vae=str(tmp_path / "vae"))
        assert {p.dtype for p in backbone.vae.model.parameters()} == {torch.float32}
        assert backbone.scale_latents(torch.ones(4, 1, 1)).unique().tolist() == [0.25]
        backbone.save(tmp_path / "final", lora=False)
        assert opened(tmp_path / "final").vae.config.scaling_factor == 0.25

    def test_parts_wait_until_they_are_used(self, base):
        backbone = load(base)
        for part in (backbone.vae, *backbone.texts):
            assert not {"model", "encoder", "tokenizer"} & set(vars(part))


class TestTimes:
    def rescaled(self) -> np.ndarray:
        """alphas_cumprod with zero terminal SNR (arXiv 2305.08891, algorithm 1), in double precision."""
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        root = np.sqrt(np.cumprod(1 - betas))
        return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

    def test_turbo_has_no_signal_at_the_last_time(self, base, turbo):
        schedule = load(turbo, variant="turbo").schedule
        np.testing.assert_allclose(schedule.alphas_cumprod.double(), self.rescaled(), atol=2e-6)
        assert schedule.alphas_cumprod[-1] == 0
        assert schedule.alphas_cumprod[0] == load(base).schedule.alphas_cumprod[0]
        oracle: Any = diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
        )
        assert torch.equal(schedule.alphas_cumprod, oracle.alphas_cumprod)
        # SalesforceAIResearch/DiffusionDPO, train.py at 5233e75, enforce_zero_terminal_snr, run on diffusers'
        # DDPMScheduler with these betas: alphas_cumprod[[0, 249, 499, 749, 999]]
        published = [0.9991499781608582, 0.654188871383667, 0.24235899746418, 0.03317145258188248, 0.0]
        np.testing.assert_allclose(schedule.alphas_cumprod[[0, 249, 499, 749, 999]], published, rtol=1e-6)

    def test_at_turbos_last_time_both_images_of_a_pair_are_the_same_noise(self, turbo):
        """So that a quarter of its pairs has no margin to learn from, as in the published script."""
        schedule = load(turbo, variant="turbo").schedule
        x0, noise, t = noisy(2), noisy(1).expand(2, -1, -1, -1), torch.tensor([999, 999])
        assert torch.equal(schedule.add_noise(x0, noise, t), noise)
        assert torch.equal(schedule.target(x0, noise, t), noise)

    def drawn(self, folder: Path, **model: Any) -> torch.Tensor:
        schedule = load(folder, **model).schedule
        return torch.stack([schedule.sample_t(generator(draw, "time")) for draw in range(2000)])

    def test_turbo_trains_at_four_times(self, turbo):
        times, counts = self.drawn(turbo, variant="turbo").unique(return_counts=True)
        assert times.tolist() == [249, 499, 749, 999]
        assert (counts / 2000 - 0.25).abs().max() < 0.04

    def test_the_refiner_trains_below_200(self, refiner):
        times = self.drawn(refiner, variant="refiner")
        assert times.dtype == torch.int64 and times.min() == 0 and times.max() == 199
        assert len(times.unique()) == 200 and abs(times.double().mean() - 99.5) < 5

    def test_the_base_trains_at_all_with_its_own_schedule(self, base, turbo):
        times = self.drawn(base)
        assert times.min() < 10 and times.max() > 989
        for folder in (base, turbo):
            assert load(folder).schedule.alphas_cumprod[-1] > 0.004


class TestRefused:
    """Each with one line, before any weights are loaded: the folders have none."""

    @pytest.fixture
    def emptied(self, tmp_path):
        def without_weights(source: Path) -> Path:
            changed = copy_of(source, tmp_path / source.name)
            for file in changed.rglob("*.safetensors"):
                file.unlink()
            return changed

        return without_weights

    @pytest.mark.parametrize("variant", ["turbo", "refiner"])
    def test_variants_are_sdxls(self, pipeline, emptied, variant):
        folder = emptied(pipeline)
        expected = f"model.variant: {variant} is one of SDXL's, and {folder} is no SDXL pipeline"
        assert refused(folder, variant=variant) == expected

    def test_a_refiner_is_no_base_and_no_turbo(self, refiner, emptied):
        folder = emptied(refiner)
        for variant in ("base", "turbo"):
            message = refused(folder, variant=variant)
            assert message.startswith(f"model.variant: {variant}, but {folder} is SDXL's refiner; it draws no images")
            assert message.endswith("trains as the variant refiner")

    def test_a_base_is_no_refiner(self, base, emptied):
        folder = emptied(base)
        message = refused(folder, variant="refiner")
        assert message.startswith(f"model.variant: refiner, but {folder} takes no aesthetic score")

    def test_a_base_is_no_turbo(self, base, emptied):
        folder = emptied(base)
        message = refused(folder, variant="turbo")
        assert message.startswith(f"model.variant: turbo, but {folder} is not SDXL-Turbo")

    def test_a_turbo_that_trains_as_a_base_is_warned_of(self, base, turbo, caplog):
        for folder, trainable, told in ((turbo, True, 1), (turbo, False, 0), (base, True, 0)):
            caplog.clear()
            check_variant(ModelConfig(pretrained=str(folder)), folder, "sdxl", trainable)
            assert len(caplog.records) == told
        check_variant(ModelConfig(pretrained=str(turbo), variant="turbo"), turbo, "sdxl", True)
        assert not caplog.records

    def test_a_refiner_has_no_validation_images(self):
        images = ValidationConfig(prompts="embedded")
        with pytest.raises(UserError, match=r"validation\.prompts: SDXL's refiner draws no images from prompts alone"):
            check(Config(model=ModelConfig(variant="refiner"), validation=images))
        check(Config(model=ModelConfig(variant="turbo"), validation=images))

    def test_an_unknown_prediction_type(self, base, tmp_path, emptied):
        wrong = {"prediction_type": "sample", "timestep_spacing": "trailing"}
        folder = edited(emptied(base), tmp_path / "p", "scheduler/scheduler_config.json", **wrong)
        for variant in ("base", "turbo"):
            assert "predicts 'sample'; only epsilon and v_prediction" in refused(folder, variant=variant)

    def test_another_kind_of_noise_level(self, base, tmp_path, emptied):
        kind = {"_class_name": "EDMEulerScheduler"}
        folder = edited(emptied(base), tmp_path / "p", "scheduler/scheduler_config.json", **kind)
        assert refused(folder) == "the model's scheduler is an EDMEulerScheduler; EDM's noise levels are not supported"

    def test_a_unet_of_another_family(self, base, emptied, tmp_path):
        folder = emptied(base)
        for name, unet in {
            "sd": make_plain_unet(text_width=40),
            "narrow": make_unet(24),
            "refiner": make_unet(time_ids=5),
        }.items():
            unet.save_config(tmp_path / name)
        assert refused(folder, unet=str(tmp_path / "sd")).endswith(
            "takes no pooled text and time ids; it is not of SDXL"
        )
        narrow = refused(folder, unet=str(tmp_path / "narrow"))
        assert narrow.endswith("takes text of width 24, but the text encoders give 40")
        other = refused(folder, unet=str(tmp_path / "refiner"))
        assert other.endswith("takes 52 numbers of pooled text and time ids, but the pipeline gives 60")

    def test_an_inpainting_unet(self, base, emptied, tmp_path):
        folder = edited(emptied(base), tmp_path / "p", "unet/config.json", in_channels=9)
        assert "unet takes 9 channels, but" in refused(folder)

    @pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "text_encoder_2", "tokenizer_2", "scheduler"])
    def test_a_missing_part_is_named(self, base, emptied, part):
        broken = emptied(base)
        (broken / part).rename(broken.parent / "elsewhere")
        assert refused(broken).startswith(f"{broken} has no {part}/ folder (")
