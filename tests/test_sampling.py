"""Sampling: the images of the plain diffusers pipeline, one generator an image, whatever shares the batch."""

import diffusers
import pytest
import torch
from support.tiny import load, open_plain

from diffpref.errors import UserError
from diffpref.evaluate.generate import to_images
from diffpref.sampling import SAMPLERS, Sampling, sample, scheduler_of

PROMPTS = ["a large red circle", "a small blue cross on the left", "", "grey background"]
SEEDS = [3, 17, 2**32 - 1, 5]
STEPS = 5


def ours(backbone, sampler: str, guidance: float, prompts=PROMPTS, seeds=SEEDS) -> torch.Tensor:
    scheduler = scheduler_of(sampler, backbone.scheduler_config)
    return sample(backbone, scheduler, prompts, seeds, 32, Sampling(sampler, STEPS, guidance))


def theirs(pipe, sampler: str, guidance: float, prompt: str, seed: int, kind: str):
    pipe.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(pipe.scheduler.config)
    return pipe(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        height=32,
        width=32,
        output_type=kind,
    ).images


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def both(request, pipeline, v_pipeline):
    """Our backbone and the plain pipeline of the same folder."""
    folder = pipeline if request.param == "epsilon" else v_pipeline
    return load(folder), open_plain(folder)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_and_images_are_those_of_the_plain_pipeline(both, sampler, guidance):
    backbone, pipe = both
    latents = ours(backbone, sampler, guidance)
    for place, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        expected = theirs(pipe, sampler, guidance, prompt, seed, "latent")
        torch.testing.assert_close(latents[place : place + 1], expected, atol=1e-5, rtol=1e-5)
    alone = to_images(backbone.decode(ours(backbone, sampler, guidance, PROMPTS[1:2], SEEDS[1:2])))[0]
    assert alone.tobytes() == theirs(pipe, sampler, guidance, PROMPTS[1], SEEDS[1], "pil")[0].tobytes()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_of_four_is_four_batches_of_one(pipeline, sampler):
    backbone = load(pipeline)
    together = ours(backbone, sampler, 3.0)
    alone = [ours(backbone, sampler, 3.0, [p], [s]) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    pixels, apart = backbone.decode(together), torch.cat([backbone.decode(latents) for latents in alone])
    torch.testing.assert_close(pixels, apart, atol=1e-5, rtol=0)  # a rounded pixel may differ by 1 at most


def test_seed_prompt_and_guidance_each_change_the_image(pipeline):
    backbone = load(pipeline)

    def one(seed=3, prompt=PROMPTS[0], guidance=3.0):
        return ours(backbone, "ddim", guidance, [prompt], [seed])

    assert torch.equal(one(), one())
    assert (one() - one(seed=4)).abs().max() > 0.1
    assert (one() - one(prompt="a cross")).abs().max() > 1e-4
    assert (one() - one(guidance=1.0)).abs().max() > 1e-4


def test_guidance_of_one_and_below_is_no_guidance(pipeline):
    backbone = load(pipeline)
    assert torch.equal(ours(backbone, "ddim", 1.0), ours(backbone, "ddim", 0.0))


def test_the_global_generator_plays_no_part(pipeline):
    backbone = load(pipeline)
    images = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        images.append(ours(backbone, "ddpm", 3.0))
    assert torch.equal(*images)


def test_more_steps_than_the_model_knows_are_refused(pipeline):
    backbone = load(pipeline)
    scheduler = scheduler_of("ddim", backbone.scheduler_config)
    with pytest.raises(UserError, match=r"sampling steps: .*1001.*1000"):
        sample(backbone, scheduler, ["a"], [0], 32, Sampling("ddim", 1001, 1.0))
