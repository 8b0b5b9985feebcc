"""Stable Diffusion folders: what is loaded is what diffusers loads, what is saved is what diffusers opens."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.families.stable import make_sd2
from support.tiny import (
    PROMPTS,
    copy_of,
    learn,
    load,
    make_unet,
    make_vae,
    open_plain,
    points,
    predict,
    write_json,
)

from diffpref.errors import UserError
from diffpref.evaluate.generate import to_images
from diffpref.sampling import Sampling, sample, scheduler_of


def pictures(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def images(backbone) -> list[bytes]:
    how = Sampling("ddim", 4, 3.0)
    scheduler = scheduler_of("ddim", backbone.scheduler_config)
    latents = [sample(backbone, scheduler, [prompt], [7], 32, how) for prompt in PROMPTS]
    return [to_images(backbone.decode(each))[0].tobytes() for each in latents]


class TestLoading:
    def test_text_is_what_the_plain_pipeline_computes(self, pipeline):
        plain = open_plain(pipeline)
        expected, _ = plain.encode_prompt(PROMPTS, "cpu", 1, False)
        torch.testing.assert_close(load(pipeline).encode_prompts(PROMPTS), {"text": expected})

    def test_a_long_prompt_is_cut_and_a_short_one_filled(self, pipeline):
        text = load(pipeline).encode_prompts(["red " * 200, "red"])["text"]
        assert text.shape == (2, 16, 16)

    def test_latents_are_the_mean_of_the_posterior(self, pipeline):
        backbone, vae = load(pipeline), AutoencoderKL.from_pretrained(pipeline / "vae")
        with torch.no_grad():
            mean = vae.encode(pictures()).latent_dist.mean
        latents = backbone.encode_images(pictures())
        assert torch.equal(latents, mean) and latents.shape == (3, 4, 8, 8)
        assert torch.equal(backbone.scale_latents(latents), mean * 0.6)

    def test_pixels_are_decoded_as_diffusers_decodes_them(self, pipeline):
        plain, latents = open_plain(pipeline), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)) * 3
        with torch.no_grad():
            decoded = plain.vae.decode(latents / 0.6).sample
        expected = plain.image_processor.postprocess(decoded, output_type="pt")
        pixels = load(pipeline).decode(latents)
        torch.testing.assert_close(pixels, expected)
        assert pixels.min() >= 0 and pixels.max() <= 1

    def test_predictions_are_those_of_the_plain_network(self, pipeline):
        backbone, unet = load(pipeline), UNet2DConditionModel.from_pretrained(pipeline / "unet")
        at = points(backbone)
        with torch.no_grad():
            assert torch.equal(predict(backbone, at), unet(at.x_t, at.t, at.cond["text"]).sample)

    def test_shapes_and_schedule(self, pipeline, v_pipeline):
        backbone = load(pipeline)
        assert backbone.resolution == 32
        assert backbone.latent_shape(32, 32) == (4, 8, 8) and backbone.latent_shape(48, 20) == (4, 5, 12)
        assert list(backbone.encode_prompts(["a"])) == list(backbone.cond_names)
        assert backbone.schedule.prediction_type == "epsilon"
        assert load(v_pipeline).schedule.prediction_type == "v_prediction"

    @pytest.mark.parametrize("resolution", [30, 33, 1])
    def test_a_side_that_is_no_multiple_is_refused(self, pipeline, resolution):
        with pytest.raises(UserError, match=f"resolution: {resolution} is no multiple of the VAE's 4"):
            load(pipeline).latent_shape(resolution, resolution)

    def test_nothing_trains_unless_asked(self, pipeline):
        assert not any(p.requires_grad for p in load(pipeline).net.parameters())
        assert all(p.requires_grad for p in load(pipeline, trainable=True).net.parameters())

    def test_vae_and_text_encoder_wait_until_they_are_used(self, pipeline):
        backbone = load(pipeline, trainable=True)
        assert not {"model", "encoder", "tokenizer"} & {*vars(backbone.vae), *vars(backbone.text)}


class TestIdentity:
    def test_a_changed_weight_changes_its_own_hash(self, pipeline, tmp_path):
        changed, before = copy_of(pipeline, tmp_path / "p"), load(pipeline).identity()
        assert load(changed).identity() == before
        for part, key in (
            ("vae/diffusion_pytorch_model.safetensors", "vae"),
            ("text_encoder/model.safetensors", "text"),
        ):
            last = load(changed).identity()
            state = load_file(changed / part)
            name = sorted(state)[0]
            state[name].view(-1)[0] += 1e-3
            save_file(state, changed / part, metadata={"format": "pt"})
            now = load(changed).identity()
            assert {name for name in now if now[name] != last[name]} == {key}

    def test_the_tokenizer_counts_for_text_and_the_precision_does_not(self, pipeline, tmp_path):
        changed, before = copy_of(pipeline, tmp_path / "p"), load(pipeline).identity()
        assert load(pipeline, weights=torch.bfloat16).identity() == before
        (changed / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
        assert load(changed).identity()["text"] != before["text"]

    def test_the_unet_does_not_count(self, pipeline, tmp_path):
        changed = copy_of(pipeline, tmp_path / "p")
        make_unet().save_pretrained(changed / "unet")
        assert load(changed).identity() == load(pipeline).identity()


class TestOverrides:
    def test_another_vae(self, pipeline, v_pipeline, tmp_path):
        make_vae(scaling_factor=0.25).save_pretrained(tmp_path / "vae")
        backbone = load(pipeline, vae=str(tmp_path / "vae"))
        other = AutoencoderKL.from_pretrained(tmp_path / "vae")
        with torch.no_grad():
            assert torch.equal(backbone.encode_images(pictures()), other.encode(pictures()).latent_dist.mean)
        assert backbone.scale_latents(torch.ones(1)).item() == 0.25
        assert backbone.identity()["vae"] != load(pipeline).identity()["vae"]
        assert load(pipeline, vae=str(v_pipeline)).identity()["vae"] == load(v_pipeline).identity()["vae"]

    def test_another_unet(self, pipeline, v_pipeline):
        backbone, other = load(pipeline, unet=str(v_pipeline / "unet")), load(v_pipeline)
        at = points(backbone)
        assert torch.equal(predict(backbone, at), predict(other, at))
        assert backbone.schedule.prediction_type == "epsilon"

    def test_what_was_given_is_what_is_saved(self, pipeline, tmp_path):
        make_vae(scaling_factor=0.25).save_pretrained(tmp_path / "vae")
        source = copy_of(pipeline, tmp_path / "p")
        (source / "vae" / "of_the_former.txt").touch()
        load(source, vae=str(tmp_path / "vae"), trainable=True).save(tmp_path / "final", lora=False)
        saved, given = ({path.name for path in (tmp_path / place).iterdir()} for place in ("final/vae", "vae"))
        assert saved == given
        assert open_plain(tmp_path / "final").vae.config.scaling_factor == 0.25


class TestWrongFolders:
    @pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "tokenizer", "scheduler"])
    def test_a_missing_part_is_named(self, pipeline, tmp_path, part):
        broken = copy_of(pipeline, tmp_path / "p")
        (broken / part).rename(tmp_path / "elsewhere")
        with pytest.raises(UserError) as error:
            load(broken)
        message = str(error.value)
        assert message.startswith(f"{broken} has no {part}/ folder (") and "\n" not in message

    @pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
    def test_broken_json_is_named(self, pipeline, tmp_path, file):
        broken = copy_of(pipeline, tmp_path / "p")
        (broken / file).write_text('{"half": ')
        with pytest.raises(UserError) as error:
            load(broken)
        assert str(broken / file.split("/")[0]) in str(error.value) and "\n" not in str(error.value)

    def use(self, folder):
        backbone = load(folder)
        backbone.encode_prompts(["a"])
        backbone.encode_images(pictures(1))

    @pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
    @pytest.mark.parametrize(
        "file",
        [
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
        ],
    )
    def test_damaged_weights_are_named(self, pipeline, tmp_path, file, damage):
        broken = copy_of(pipeline, tmp_path / "p")
        content = (broken / file).read_bytes()
        (broken / file).unlink()
        if damage != "missing":
            (broken / file).write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
        with pytest.raises(UserError) as error:
            self.use(broken)
        message = str(error.value)
        assert message.startswith(f"{broken / file.split('/')[0]} does not load as a ") and "\n" not in message

    def test_a_broken_tokenizer_is_named(self, pipeline, tmp_path):
        broken = copy_of(pipeline, tmp_path / "p")
        for file in (broken / "tokenizer").iterdir():
            file.write_text("{")
        with pytest.raises(UserError, match="tokenizer does not load as a CLIPTokenizer"):
            self.use(broken)

    def test_a_unet_of_another_family_is_refused(self, pipeline, tmp_path):
        make_unet(text_width=32).save_pretrained(tmp_path / "wide")
        with pytest.raises(UserError, match=r"wide takes text of width 32, but .*text_encoder gives 16"):
            load(pipeline, unet=str(tmp_path / "wide"))
        make_unet(channels=9).save_pretrained(tmp_path / "inpainting")
        with pytest.raises(UserError, match=r"inpainting takes 9 channels, but .*vae gives 4"):
            load(pipeline, unet=str(tmp_path / "inpainting"))

    def test_an_unknown_prediction_type_is_refused_before_weights_are_loaded(self, pipeline, tmp_path):
        changed = copy_of(pipeline, tmp_path / "p")
        file = changed / "scheduler" / "scheduler_config.json"
        write_json(file, {**json.loads(file.read_text()), "prediction_type": "sample"})
        for weights in changed.rglob("*.safetensors"):
            weights.unlink()
        with pytest.raises(UserError) as error:
            load(changed)
        message = "the model's scheduler predicts 'sample'; only epsilon and v_prediction are supported"
        assert str(error.value) == message

    @pytest.mark.parametrize("key", [{"block_out_channels": []}, {"down_block_types": ["NoSuchBlock"] * 2}])
    def test_a_config_of_no_unet_is_refused_before_weights_are_loaded(self, pipeline, tmp_path, key):
        changed = copy_of(pipeline, tmp_path / "p")
        file = changed / "unet" / "config.json"
        write_json(file, {**json.loads(file.read_text()), **key})
        (changed / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(UserError) as error:
            load(changed)
        message = str(error.value)
        assert (
            message.startswith(f"{changed / 'unet'} does not load as a UNet2DConditionModel: ") and "\n" not in message
        )


class TestSecondGeneration:
    """SD2.x: OpenCLIP's text encoder (gelu), filled with exclamation marks; linear projections; the velocity."""

    @pytest.fixture(scope="class")
    def second(self, tmp_path_factory):
        return make_sd2(tmp_path_factory.mktemp("sd2") / "pipeline")

    def test_text_is_what_the_plain_pipeline_computes(self, second):
        expected, _ = open_plain(second).encode_prompt(PROMPTS, "cpu", 1, False)
        backbone = load(second)
        torch.testing.assert_close(backbone.encode_prompts(PROMPTS), {"text": expected})
        assert backbone.text.encoder.config.hidden_act == "gelu"
        assert backbone.text.tokens(["red"])[0, 3:].unique().tolist() == [backbone.text.tokenizer.vocab["!"]]

    def test_the_velocity_is_learnt_and_the_samples_are_plain_diffusers(self, second, tmp_path):
        backbone = load(second, trainable=True)
        assert backbone.schedule.prediction_type == "v_prediction"
        x0, noise = torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 2.0)
        kept = backbone.schedule.alphas_cumprod[600].item()
        velocity = backbone.schedule.target(x0, noise, torch.tensor([600]))
        assert velocity.unique().item() == pytest.approx(2 * kept**0.5 - (1 - kept) ** 0.5, rel=1e-5)
        learn(backbone)
        after = images(backbone)
        backbone.save(tmp_path / "final", lora=False)
        plain = open_plain(tmp_path / "final")
        assert plain.scheduler.config.prediction_type == "v_prediction"
        for prompt, expected in zip(PROMPTS, after, strict=True):
            generator = torch.Generator().manual_seed(7)
            image = plain(prompt, num_inference_steps=4, guidance_scale=3.0, generator=generator, height=32, width=32)
            assert image.images[0].tobytes() == expected


class TestSaving:
    def test_the_whole_pipeline_opens_plainly_with_the_same_images(self, pipeline, tmp_path):
        backbone = load(pipeline, trainable=True)
        before = images(backbone)
        learn(backbone)
        after = images(backbone)
        assert before != after
        backbone.save(tmp_path / "final", lora=False)
        plain = open_plain(tmp_path / "final")
        from diffusers import DDIMScheduler

        plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
        for prompt, expected in zip(PROMPTS, after, strict=True):
            generator = torch.Generator().manual_seed(7)
            image = plain(prompt, num_inference_steps=4, guidance_scale=3.0, generator=generator, height=32, width=32)
            assert image.images[0].tobytes() == expected
        assert images(load(tmp_path / "final")) == after

    def test_older_tokenizers_find_their_files(self, pipeline, tmp_path):
        load(pipeline, trainable=True).save(tmp_path / "final", lora=False)
        assert {"vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "final" / "tokenizer").iterdir()}

    def test_a_pipeline_without_its_safety_checker_opens_after_saving(self, pipeline, tmp_path):
        fetched = copy_of(pipeline, tmp_path / "p")
        index = json.loads((fetched / "model_index.json").read_text())
        index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
        write_json(fetched / "model_index.json", index)
        load(fetched, trainable=True).save(tmp_path / "final", lora=False)
        assert isinstance(open_plain(tmp_path / "final"), StableDiffusionPipeline)


class TestPrecision:
    def test_bf16_weights_predict_nearly_the_same(self, pipeline):
        full, half = load(pipeline), load(pipeline, weights=torch.bfloat16)
        at = points(full)
        with torch.no_grad():
            low = predict(half, points(half))
        assert low.dtype == torch.bfloat16
        assert half.encode_images(pictures()).dtype == torch.float32
        assert torch.equal(half.encode_images(pictures()), full.encode_images(pictures()))
        assert (low.float() - predict(full, at)).norm() / predict(full, at).norm() < 0.05

    def test_bf16_with_adapters_trains_under_autocast(self, pipeline):
        backbone = load(pipeline, trainable=True, weights=torch.bfloat16, lora_rank=2)
        at, base = points(backbone), load(pipeline, weights=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(predict(backbone, at), predict(base, at))
            predict(backbone, at).float().square().mean().backward()
        gradients = [p.grad for p in backbone.net.parameters() if p.requires_grad]
        assert all(g is not None and g.dtype == torch.float32 for g in gradients)
        assert sum(g.abs().sum() for g in gradients) > 0
