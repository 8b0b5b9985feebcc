"""Train the embedded base model: an autoencoder, then a text encoder and a U-Net, saved as a diffusers folder.

The pictures are what a crawler would bring home: two in five spoilt, their captions partly careless. So the model
learns the world but is imperfect as real base models are, and preferences have something to teach it.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffpref.embedded import world
from diffpref.progress import Bar, track

SPOILT_SHARE = 0.4
WRONG_ATTRIBUTE_RATE = 0.35
EMPTY_CAPTION_RATE = 0.1
TEXT_LENGTH = 16
PICTURES = 24_000
VAE_STEPS, VAE_BATCH, VAE_RATE = 2000, 64, 2e-3
BASE_BATCH, BASE_RATE, EMA_DECAY = 128, 1.5e-3, 0.998


def build_base(folder: Path, seed: int, steps: int) -> None:
    """Train everything from `seed` and save the pipeline folder; the U-Net takes `steps` batches of 128.

    An autoencoder that lies in the folder already, from a run that was cut, is taken as it is.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pictures, shown = _paint_many(rng)
    if (folder / "vae").exists():
        vae = AutoencoderKL.from_pretrained(folder / "vae")
    else:
        vae = _train_vae(pictures)
        vae.save_pretrained(folder / "vae")
    tokenizer = make_tokenizer(folder / "tokenizer")
    torch.manual_seed(seed + 1)  # so that the U-Net is the same whether or not the autoencoder was there already
    rng = np.random.default_rng(seed + 1)
    text_encoder, unet = _train_unet(vae, tokenizer, pictures, shown, rng, steps)
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    pipeline = StableDiffusionPipeline(**parts)
    pipeline.save_pretrained(folder)
    _save_classic_vocabulary(folder / "tokenizer")


def _paint_many(rng: np.random.Generator) -> tuple[torch.Tensor, list[world.Composition]]:
    everything = world.compositions()
    shown = [everything[i] for i in rng.integers(0, len(everything), PICTURES)]
    pictures = np.empty((PICTURES, world.SIDE, world.SIDE, 3), dtype=np.uint8)
    for i, composition in enumerate(track(shown, "painting", PICTURES, "pictures")):
        clutter = rng.uniform(0, 0.7) if rng.random() < SPOILT_SHARE else 0.0
        pictures[i] = world.paint(composition, rng, clutter)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), shown


def _pixels(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float() / 127.5 - 1


def _train_vae(pictures: torch.Tensor) -> Any:
    vae: Any = AutoencoderKL.from_config(
        {
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "block_out_channels": (16, 32, 64),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
            "sample_size": world.SIDE,
            "mid_block_add_attention": False,
        }
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, weight_decay=1e-4, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_RATE, VAE_STEPS, pct_start=0.05)
    with Bar("autoencoder", VAE_STEPS, "steps") as bar:
        for _ in range(VAE_STEPS):
            images = _pixels(pictures[torch.randint(0, len(pictures), (VAE_BATCH,))])
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
            divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
            loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 1e-4 * divergence
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            rates.step()
            bar.advance(note=f"loss {loss.item():.4f}")
    with torch.no_grad():
        latents = vae.encode(_pixels(pictures[:2048])).latent_dist.sample()
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte pairs are learnt from the world's captions, so that each of its words is a token."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*letters, *(letter + "</w>" for letter in letters), *special]
    plain = CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    captions = [c.caption(t) for c in world.compositions() for t in range(len(world.TEMPLATES))]
    learnt = plain.train_new_from_iterator(captions, vocab_size=1024)
    learnt.model_max_length = TEXT_LENGTH
    learnt.save_pretrained(folder)
    _save_classic_vocabulary(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _save_classic_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt beside tokenizer.json, which alone older pipelines cannot read."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _train_unet(
    vae: Any,
    tokenizer: Any,
    pictures: torch.Tensor,
    shown: list[world.Composition],
    rng: np.random.Generator,
    steps: int,
) -> tuple[Any, Any]:
    text_encoder: Any = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.1,
        )
    )
    unet: Any = UNet2DConditionModel.from_config(
        {
            "sample_size": world.SIDE // 4,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (64, 96),
            "layers_per_block": 1,
            "norm_num_groups": 16,
            "attention_head_dim": 4,
            "cross_attention_dim": 64,
        }
    )
    trained = torch.nn.ModuleList([text_encoder, unet])
    averaged = copy.deepcopy(trained).requires_grad_(False)
    scheduler: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    with torch.no_grad():
        moments = [vae.encode(_pixels(part)).latent_dist for part in pictures.split(512)]
        mean, std = (torch.cat([getattr(m, name) for m in moments]) for name in ("mean", "std"))
    scale = vae.config["scaling_factor"]
    optimizer = torch.optim.AdamW(trained.parameters(), lr=BASE_RATE, weight_decay=1e-3, fused=True)
    warmup = min(300, steps // 10)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * min(step / steps, 1))) / 2),
    )
    with Bar("base model", steps, "steps") as bar:
        for step in range(steps):
            rows = rng.integers(0, len(pictures), BASE_BATCH)
            captions = [_careless_caption(shown[row], rng) for row in rows]
            ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
            picked = torch.from_numpy(rows)
            latents = (mean[picked] + std[picked] * torch.randn_like(std[picked])) * scale
            noise, t = torch.randn_like(latents), torch.randint(0, 1000, (BASE_BATCH,))
            noisy = scheduler.add_noise(latents, noise, t)
            loss = F.mse_loss(unet(noisy, t, text_encoder(ids).last_hidden_state).sample, noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            rates.step()
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            with torch.no_grad():
                for slow, fast in zip(averaged.parameters(), trained.parameters(), strict=True):
                    slow.lerp_(fast, 1 - decay)
            bar.advance(note=f"loss {loss.item():.4f}")
    averaged.eval()
    return averaged[0], averaged[1]


def _careless_caption(composition: world.Composition, rng: np.random.Generator) -> str:
    if rng.random() < EMPTY_CAPTION_RATE:
        return ""
    told = world.miscaptioned(composition, WRONG_ATTRIBUTE_RATE, rng)
    return told.caption(int(rng.integers(len(world.TEMPLATES))))
