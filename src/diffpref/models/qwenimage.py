"""Qwen-Image (arXiv 2508.02324): QwenImageTransformer2DModel with Qwen2.5-VL as its one text encoder.

Text is conditioned on as diffusers' QwenImagePipeline does: the prompt stands in a chat template, whose opening is cut
off the last hidden states. The pipeline fills a batch up to its longest prompt and masks what it added; here every row
is filled up to the same limit, so that a row does not depend on what shares its batch. Latents are (rows, C, h, w)
everywhere outside `predict`, which packs 2 x 2 of them into a token. The parts are loaded when first used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Real
from torch import Tensor

from diffpref.errors import UserError
from diffpref.models import folder
from diffpref.models.backbone import LatentBackbone
from diffpref.models.flow import even_sigmas, flow_schedule, freeze_idle, pack, stored_dtype, text_length, unpack
from diffpref.models.network import Network, input_dtype
from diffpref.models.text import TextPart
from diffpref.train.config import ModelConfig
from diffpref.types import Cond, Latents

NETWORK = Network("transformer", "QwenImageTransformer2DModel", "QwenImagePipeline")
TEXT_LENGTH, MAX_TEXT_LENGTH = 512, 1024  # tokens: what the pipeline reads, and what it can be asked to
SAMPLE_SIZE = 128  # latents a side by the pipeline; no config says so
OPENING = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)  # the words that the model was trained with
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"
OPENING_TOKENS = 34


@dataclass
class VideoVae:
    """Qwen-Image's autoencoder, made for videos: images are its videos of one frame. As `Vae`, but for its scaling.

    Each channel of its latents is standardized by a mean and a deviation of its own.
    """

    path: Path
    device: torch.device
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.config = folder.read_json(self.path / "config.json")

    @cached_property
    def model(self) -> Any:
        from diffusers import AutoencoderKLQwenImage

        loaded = folder.load(AutoencoderKLQwenImage, self.path, torch_dtype=torch.float32)
        return loaded.to(self.device).eval().requires_grad_(False)

    def release(self) -> None:
        """Let go of the weights; they are loaded again when they are needed."""
        self.__dict__.pop("model", None)

    @property
    def channels(self) -> int:
        """The channels of its latents."""
        return self.config["z_dim"]

    @property
    def shrink(self) -> int:
        """How many pixels a latent's side stands for."""
        return 2 ** len(self.config["temperal_downsample"])  # spelt so in the config

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Unscaled mean latents (n, C, h, w) fp32 of pixels (n, 3, H, W) in [-1, 1]."""
        frames = pixels.to(self.device, torch.float32).unsqueeze(2)
        return self.model.encode(frames).latent_dist.mean.squeeze(2)

    @torch.no_grad()
    def moments(self, pixels: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c2 h w"]:
        """Mean and log variance of the posterior of pixels, one behind the other: (n, 2 C, h, w) fp32, unscaled."""
        found = self.model.encode(pixels.to(self.device, torch.float32).unsqueeze(2)).latent_dist
        return torch.cat([found.mean, found.logvar], dim=1).squeeze(2)

    def scale(self, latents: Tensor) -> Tensor:
        """Unscaled latents (..., C, h, w), standardized."""
        mean, deviation = self._moments(latents)
        return (latents - mean) / deviation

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Pixels (n, 3, H, W) fp32 in [0, 1] of scaled latents."""
        latents = latents.to(self.device, torch.float32)
        mean, deviation = self._moments(latents)
        frames = self.model.decode((latents * deviation + mean).unsqueeze(2)).sample
        return (frames.squeeze(2) / 2 + 0.5).clamp(0, 1)

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        names = ("latents_mean", "latents_std")
        mean, deviation = (like.new_tensor(self.config[name]).reshape(-1, 1, 1) for name in names)
        return mean, deviation


@dataclass(kw_only=True)
class QwenImage(LatentBackbone):
    """The Backbone of Qwen-Image.

    Conditioning: {"text": (rows, tokens, width), "mask": (rows, tokens), 1 for a prompt's tokens and 0 behind them}.
    """

    vae: VideoVae
    text: TextPart
    network: ClassVar[Network] = NETWORK
    cond_names: ClassVar[tuple[str, ...]] = ("text", "mask")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Cond:
        """The last hidden states of prompt and closing words, zeros behind them, and their mask; fp32."""
        length = self.text.length
        tokens = self.text.tokenizer(
            [OPENING + prompt + CLOSING for prompt in prompts],
            max_length=OPENING_TOKENS + length,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        # without the outermost module, which would score the whole vocabulary at every token
        states = self.text.encoder.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        text = states.new_zeros(len(prompts), length, states.shape[-1], dtype=torch.float32)
        mask = states.new_zeros(len(prompts), length, dtype=torch.float32)
        for row, (state, real) in enumerate(zip(states, tokens.attention_mask.bool(), strict=True)):
            told = state[real][OPENING_TOKENS:]  # on whichever side the tokenizer fills up
            text[row, : len(told)], mask[row, : len(told)] = told.float(), 1
        return {"text": text, "mask": mask}

    def overlong(self, prompts: list[str]) -> set[int]:
        """The places of prompts whose ends the text encoder does not read."""
        return self.text.overlong(prompts)

    def predict(self, x_t: Latents, t: Real[Tensor, " rows"], cond: Cond) -> Latents:
        """The transformer's velocity (rows, C, h, w)."""
        dtype = input_dtype(self.net, x_t)
        rows, _, h, w = x_t.shape
        tokens = self.net(
            hidden_states=pack(x_t.to(dtype)),
            timestep=t / 1000,
            encoder_hidden_states=cond["text"].to(dtype),
            encoder_hidden_states_mask=cond["mask"].bool(),
            img_shapes=[[(1, h // 2, w // 2)]] * rows,
            return_dict=False,
        )[0]
        return unpack(tokens, h, w)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents; raises UserError for a side that is no multiple of a token's."""
        shrink = self.vae.shrink
        for side in (width, height):
            if side % (2 * shrink):
                both = f"{2 * shrink}, the VAE's {shrink} times the patch's 2"
                raise UserError(f"resolution: {side} is no multiple of {both}")
        return self.vae.channels, height // shrink, width // shrink

    @property
    def resolution(self) -> int:
        """The side in pixels at which the pipeline draws by itself."""
        return SAMPLE_SIZE * self.vae.shrink

    def identity(self) -> dict[str, str]:
        """What latents (`vae`) and text embeddings (`text`) depend on: hashes of weights, and the text's length."""
        return {"vae": folder.weights_hash(self.vae.path), "text": f"{self.text.identity()} {self.text.length}"}

    def sigmas(self, steps: int) -> list[float] | None:
        """Even steps from 1 down to 1 / steps."""
        return even_sigmas(steps)

    def guide(self, empty: Tensor, told: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance whose tokens keep the length of those predicted with the prompt, (rows, C, h, w)."""
        guided, length = pack(empty + scale * (told - empty)), pack(told).norm(dim=-1, keepdim=True)
        return unpack(guided * (length / guided.norm(dim=-1, keepdim=True)), *told.shape[-2:])


def load(model: ModelConfig, device: torch.device, weights: torch.dtype, trainable: bool) -> QwenImage:
    """Load the family's Backbone from `model.pretrained` with its overrides.

    The transformer is fp32 if all of it trains, else in the dtype `weights`, with fp32 adapters.
    Raises UserError where a part is missing or does not fit.
    """
    pipeline = folder.resolve(model.pretrained, model.revision)
    vae = VideoVae(folder.override(model.vae, "vae") if model.vae else folder.component(pipeline, "vae"), device)
    text = TextPart(
        pipeline,
        "",
        device,
        kind="Qwen2_5_VLForConditionalGeneration",
        tokenizer_kind="Qwen2Tokenizer",
        dtype=stored_dtype(folder.component(pipeline, "text_encoder")),
        limit=text_length(model, TEXT_LENGTH, MAX_TEXT_LENGTH),
    )
    scheduler_config = folder.read_json(folder.component(pipeline, "scheduler") / "scheduler_config.json")
    schedule = flow_schedule(scheduler_config)
    path = NETWORK.find(model, pipeline)
    sketch = NETWORK.sketch(path)
    _check_fit(sketch.config, vae, text, path)
    net = NETWORK.load(path, sketch, model, device, weights, trainable)
    # what the last block makes of the text, and the queries it asks for it with: nobody reads them any more
    last = f"transformer_blocks.{sketch.config.num_layers - 1}"
    idle = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")
    freeze_idle(net, tuple(f"{last}.{name}" for name in idle))
    return QwenImage(
        net=net, schedule=schedule, pipeline=pipeline, vae=vae, scheduler_config=scheduler_config, text=text
    )


def _check_fit(config: Any, vae: VideoVae, text: TextPart, path: Path) -> None:
    """Refuse a transformer of another family or size, whose first forward would fail in the middle of the work."""
    width = (text.config.get("text_config") or text.config).get("hidden_size")
    if config.joint_attention_dim != width:
        raise UserError(f"{path} takes text of width {config.joint_attention_dim}, but {text.path} gives {width}")
    if config.in_channels != 4 * vae.channels:
        raise UserError(f"{path} takes {config.in_channels // 4} channels, but {vae.path} gives {vae.channels}")
