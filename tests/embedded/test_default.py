"""The shipped default: its size, its model, its preferences and its held-out prompts."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffpref import embedded
from diffpref.embedded import world
from diffpref.embedded.judge import judge, measure
from diffpref.evaluate.generate import to_images, wishes
from diffpref.evaluate.prompts import read_prompts
from diffpref.models.loading import load_backbone
from diffpref.presets.embedded import GUIDANCE_SCALE, INFERENCE_STEPS, SAMPLER
from diffpref.sampling import Sampling, sample, scheduler_of
from diffpref.train.config import ModelConfig


@pytest.fixture(scope="module")
def table():
    return pq.read_table(embedded.PREFERENCES / "train.parquet")


def test_it_is_small():
    parts = [*embedded.MODEL.rglob("*"), *embedded.PREFERENCES.rglob("*"), embedded.PROMPTS]
    assert sum(path.stat().st_size for path in parts if path.is_file()) <= 25e6


def test_opens_with_plain_diffusers():
    pipeline = StableDiffusionPipeline.from_pretrained(embedded.MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    names = [type(part).__name__ for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)]
    assert names == ["UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTokenizer"]
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler"
    assert pipeline("a small red circle on the left, grey background", num_inference_steps=2).images[0].size == (32, 32)


def test_every_word_of_the_world_is_one_token():
    tokenizer = load_backbone(ModelConfig("embedded"), torch.device("cpu"), torch.float32, False).text.tokenizer
    for composition in world.compositions()[::7]:
        caption = composition.caption(0)
        words = caption.replace(",", " ,").split()
        assert [token.removesuffix("</w>") for token in tokenizer.tokenize(caption)] == words
        assert len(words) + 2 <= tokenizer.model_max_length


def test_the_base_model_is_imperfect_as_real_ones_are():
    backbone = load_backbone(ModelConfig("embedded"), torch.device("cpu"), torch.float32, trainable=False)
    wanted = wishes(read_prompts("embedded")[::3], 1, seed=0)
    prompts = [wish.prompt for wish in wanted]
    how = Sampling(SAMPLER, INFERENCE_STEPS, GUIDANCE_SCALE)
    scheduler = scheduler_of(SAMPLER, backbone.scheduler_config)
    latents = sample(backbone, scheduler, prompts, [wish.seed for wish in wanted], world.SIDE, how)
    images = to_images(backbone.decode(latents))
    marks = [measure(image).marks(prompt) for image, prompt in zip(images, prompts, strict=True)]
    right = np.mean([[mark[name] for name in world.ATTRIBUTES] for mark in marks])
    assert 0.40 <= right <= 0.75


def test_preferences_have_the_schema_of_pick_a_pic(table):
    assert {
        "are_different", "best_image_uid", "caption", "created_at", "has_label", "image_0_uid", "image_0_url",
        "image_1_uid", "image_1_url", "jpg_0", "jpg_1", "label_0", "label_1", "model_0", "model_1",
        "num_example_per_prompt", "ranking_id", "user_id",
    } == set(table.column_names)  # fmt: skip
    assert str(table.schema.field("jpg_0").type) == "binary"
    assert str(table.schema.field("label_0").type) == "double"
    assert table.num_rows >= 2000
    assert (np.array(table["label_0"]) + np.array(table["label_1"]) == 1).all()
    assert Image.open(io.BytesIO(table["jpg_0"][0].as_py())).format == "JPEG"


def test_labels_are_the_judges_with_ties_and_mistakes(table):
    labels = np.array(table["label_0"])
    assert np.mean(labels == 0.5) == pytest.approx(0.1, abs=0.01)
    wrong = []
    for row in range(0, table.num_rows, 4):
        if labels[row] != 0.5:
            caption = table["caption"][row].as_py()
            first, second = (
                judge(Image.open(io.BytesIO(table[name][row].as_py())), caption) for name in ("jpg_0", "jpg_1")
            )
            wrong.append((first > second) != (labels[row] == 1))
    assert np.mean(wrong) == pytest.approx(0.1, abs=0.04)


def test_heldout_compositions_stand_in_no_pair(table):
    seen = {tuple(sorted(world.read_caption(caption).items())) for caption in set(table["caption"].to_pylist())}
    heldout = [prompt.text for prompt in read_prompts("embedded")]
    assert len(heldout) == len(set(heldout)) == 216
    for prompt in heldout:
        named = world.read_caption(prompt)
        assert len(named) == len(world.ATTRIBUTES)
        assert tuple(sorted(named.items())) not in seen
