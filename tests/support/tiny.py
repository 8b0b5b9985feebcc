"""Makers of a small random Stable Diffusion folder in diffusers' own format, and of a preference dataset beside it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from support.datasets import encoded, noise
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.direct import Direct
from diffpref.data.measuring import assign_buckets
from diffpref.data.schema import DatasetSummary, PairRow
from diffpref.data.writing import ShardWriter
from diffpref.embedded.build.base import TEXT_LENGTH, make_tokenizer
from diffpref.models import sd
from diffpref.train.config import DataConfig, ModelConfig
from diffpref.types import Points

MIXED = ((40, 40), (60, 36), (36, 60), (48, 48), (90, 30))  # of aspect ratio 1, 5/3, 3/5, 1 and 3
SIDE = 32  # pixels; latents are 4 x 8 x 8
CPU = torch.device("cpu")
PROMPTS = ["a large red circle", "", "a small blue cross on the left, grey background"]


def make_pipeline(folder: Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Save a random pipeline of about 60,000 parameters: 32-pixel images, 4 x 8 x 8 latents, text of width 16."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(folder / "tokenizer")
        make_vae().save_pretrained(folder / "vae")
        make_unet().save_pretrained(folder / "unet")
        make_text_encoder(tokenizer).save_pretrained(folder / "text_encoder")
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        clip_sample=False,
        steps_offset=1,
    )
    scheduler.save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.38.0", **parts}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None]}
    index["requires_safety_checker"] = False
    write_json(folder / "model_index.json", index)
    return folder


def make_vae(scaling_factor: float = 0.6) -> AutoencoderKL:
    """A random autoencoder that shrinks by 4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        mid_block_add_attention=False,
        scaling_factor=scaling_factor,
    )


def make_unet(text_width: int = 16, channels: int = 4) -> UNet2DConditionModel:
    """A random U-Net with cross-attention."""
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=channels,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=text_width,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A random text encoder of one layer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    return CLIPTextModel(config)


def copy_of(pipeline: Path, target: Path) -> Path:
    """A copy of a pipeline folder, to be damaged or changed."""
    shutil.copytree(pipeline, target)
    return target


def open_plain(pipeline: Path) -> StableDiffusionPipeline:
    """The folder as plain diffusers opens it."""
    opened = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    opened.set_progress_bar_config(disable=True)
    return opened


def load(pipeline: Path, trainable: bool = False, weights: torch.dtype = torch.float32, **model) -> sd.StableDiffusion:
    """The folder as our Backbone, with fields of ModelConfig."""
    return sd.load(ModelConfig(pretrained=str(pipeline), **model), CPU, weights, trainable)


def points(backbone: sd.StableDiffusion) -> Points:
    """Three points with their prompts, the same each time."""
    generator = torch.Generator().manual_seed(1)
    x_t, target = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    cond, ones = backbone.encode_prompts(PROMPTS), torch.ones(3)
    return Points(x_t, torch.tensor([10, 500, 990]), target, cond, ones, ones)


def predict(backbone: sd.StableDiffusion, at: Points) -> torch.Tensor:
    """The network's prediction there."""
    return backbone.predict(at.x_t, at.t, at.cond)


def learn(backbone: sd.StableDiffusion, steps: int = 3, rate: float = 0.05) -> None:
    """A few steps towards a target, so that every trained weight moves."""
    at = points(backbone)
    trained = [parameter for parameter in backbone.net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for _ in range(steps):
        loss = (predict(backbone, at).float() - at.target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_pairs(count: int, **columns: list) -> list[PairRow]:
    """Pairs of random pictures, two pairs a prompt; `columns` give fields of PairRow, one value a row."""
    rows = []
    for number in range(count):
        given = {name: values[number] for name, values in columns.items()}
        pair = {
            "id": f"pair-{number}",
            "prompt": f"a red circle number {number // 2}",
            "chosen": encoded(noise(2 * number, SIDE, SIDE)),
            "rejected": encoded(noise(2 * number + 1, SIDE, SIDE)),
        }
        rows.append(PairRow(**{**pair, **given}))
    return rows


def make_mixed(count: int, sizes: tuple[tuple[int, int], ...] = MIXED) -> list[PairRow]:
    """Pairs of pictures of these sizes in turn, a pair's two of the same shape and not of the same scale."""
    rows = []
    for number, pair in enumerate(make_pairs(count)):
        width, height = sizes[number % len(sizes)]
        chosen = encoded(noise(2 * number, width, height))
        rejected = encoded(noise(2 * number + 1, 2 * width, 2 * height))
        rows.append(replace(pair, chosen=chosen, rejected=rejected))
    return rows


def write_pairs(folder: Path, rows: list[PairRow]) -> Path:
    """Write pairs as a dataset in the normal form."""
    folder.mkdir(parents=True)
    with ShardWriter(folder, "train", group_rows=8) as writer:
        for row in rows:
            writer.write(row)
    ties = sum(row.label == 0.5 for row in rows)
    summary = DatasetSummary("test", "memory", "train", {}, len(rows), len(rows), ties, {}, [])
    summary.write(folder)
    return folder


def make_direct(dataset: PreferenceDataset, backbone: sd.StableDiffusion, data: DataConfig) -> Direct:
    """The encoders themselves in place of a store, at squares."""
    return Direct(dataset, backbone, data, assign_buckets(Path(), dataset, data))


def write_json(file: Path, content: object) -> None:
    """Write an object as JSON."""
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
