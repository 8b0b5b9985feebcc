"""MPS, the overall score (Zhang et al. 2024, arXiv 2405.14705): CLIP ViT-H/14 and a cross model; about 5 to 20.

Image tokens attend to those words of the caption that resemble a fixed list of what people look at. The score is the
logit scale times the cosine between the image's first token after that and the caption.

Two things differ from the published code. It divides words' likeness by the greatest of the whole batch, so that a
score depends on its neighbours; here each caption has its own greatest, as there in a batch of one. It computes in
fp16; here in the precision that is asked for. The published checkpoint is a pickled module, which is code and is
refused: weights come from RE-N-Y/mpsv1, the same as safetensors, whose own code resizes tensors where the published
one uses transformers' image processor, as here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpref.errors import UserError, first_line
from diffpref.scorers.base import Precision, Reward, Scorer
from diffpref.scorers.parts import text
from diffpref.scorers.parts import weights as files
from diffpref.scorers.parts.clip import LAION_H, VIT_H
from diffpref.scorers.parts.pixels import ClipPixels

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import CLIPModel

    from diffpref.scorers.parts.cross import CrossModel

NAME = "mps"
HOME = "RE-N-Y/mpsv1"
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
LIKE = 0.01  # of the likeness of the most alike word: below it a word is not seen
CLIP, CROSS = "model.", "cross_model."


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "fp32") -> Scorer:
    """weights: `WEIGHTS[=TOKENIZER]`. Raises UserError for weights that cannot be read or are not of this kind."""
    import torch

    place, _, words = (weights or "").partition("=")
    dtype = files.dtype_of(precision, device)
    file = files.find(place or HOME, files.MODEL_FILES, NAME)
    config = _config(file)
    clip_state, cross_state = _parted(files.read(file, NAME), f"{NAME}: {file} is no MPS")
    scale = float(clip_state["logit_scale"].float().exp()) if "logit_scale" in clip_state else 1.0
    clip = _clip(config, clip_state, f"{NAME}: {file} does not fit {_shown(config)}", dtype, device)
    cross = _cross(config.projection_dim, cross_state, f"{NAME}: {file} is no MPS: {CROSS}*", dtype, device)
    length = config.text_config.max_position_embeddings
    tokens = text.load_tokens(words or _words(place), NAME, length, cleaned=False)
    clip.text_model.eos_token_id = tokens.end  # old configurations name another one

    def read(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features of every token, filled up by ends as published, (n, length, width), and of the last."""
        ids = tokens(captions)
        ids = torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=tokens.end).to(device)
        states = clip.text_model(ids)
        return clip.text_projection(states.last_hidden_state), clip.text_projection(states.pooler_output)

    with torch.inference_mode():
        looked_at = read([CONDITION])[0][0]

    def measure(prepared: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            each, whole = read(prompts)
            likeness = (each @ looked_at.T).float().amax(dim=-1)
            seen = likeness / likeness.amax(dim=-1, keepdim=True) > LIKE
            bias = torch.zeros_like(likeness).masked_fill(~seen, -torch.inf)[:, None].to(dtype)
            pixels = torch.stack(list(prepared)).to(device, dtype)
            image = clip.visual_projection(clip.vision_model(pixels).last_hidden_state)  # without the last norm
            image = cross(image, each, bias)[:, 0].float()
            return scale * torch.nn.functional.cosine_similarity(image, whole.float(), dim=-1)

    total = files.digest(file)
    prepare = ClipPixels("floor", config.vision_config.image_size)
    identity = {
        "weights": files.label(file, total, {}, NAME),
        "sha256": total,
        "architecture": f"{_shown(config)}, {len(cross.layers)} cross layers of {cross.heads} heads",
        "precision": precision,
        "preprocessing": str(prepare),
        "text": f"{tokens}, filled up by ends",
        "formula": f"logit scale x cosine, in fp32, words above {LIKE} of each caption's greatest likeness; 1",
    }
    return Reward(NAME, identity, prepare, measure)


def _config(file: Path) -> Any:
    """The published sizes, or those of a config.json of a CLIP beside the weights. Raises UserError."""
    from transformers import CLIPConfig

    beside = file.parent / "config.json"
    try:
        content = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        return CLIPConfig.from_dict(content) if content.get("model_type") == "clip" else CLIPConfig(**VIT_H)
    except Exception as error:  # transformers raises many kinds for values
        raise UserError(f"{NAME}: {beside} is no configuration of a CLIP model: {first_line(error)}") from error


def _shown(config: Any) -> str:
    vision, words = config.vision_config, config.text_config
    towers = (f"{each.hidden_size}x{each.num_hidden_layers}/{each.num_attention_heads}" for each in (vision, words))
    return f"CLIP patches of {vision.patch_size} in {vision.image_size}, vision and text {' and '.join(towers)}"


def _parted(state: Mapping[str, Tensor], what: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of CLIP and of the cross model. Raises UserError with the first key of neither."""
    clip, cross = {}, {}
    for name, value in state.items():
        own = name.removeprefix("mps.")
        if own.startswith(CROSS) and not own.endswith("inv_freq"):  # frequencies that are computed here
            cross[own.removeprefix(CROSS).replace(".fn.", ".")] = value
        elif own.startswith(CLIP):
            clip[own.removeprefix(CLIP)] = value
        elif not own.startswith(CROSS):
            raise UserError(f"{what}: the key {name} is of no part of it")
    if not cross:
        raise UserError(f"{what}: it has no keys {CROSS}*")
    return clip, cross


def _clip(config: Any, state: Mapping[str, Tensor], what: str, dtype: torch.dtype, device: str) -> CLIPModel:
    from transformers import CLIPModel

    return files.build(lambda: CLIPModel(config), state, what, dtype, device)


def _cross(width: int, state: Mapping[str, Tensor], what: str, dtype: torch.dtype, device: str) -> CrossModel:
    """The cross model, whose number of layers and heads its weights tell."""
    from diffpref.scorers.parts.cross import HEAD_WIDTH, CrossModel

    layers = {found[1] for name in state if (found := re.match(r"layers\.(\d+)\.", name))}
    first = state.get("layers.0.0.to_q.weight")
    if first is None:
        raise UserError(f"{what} has no layers.0.0.fn.to_q.weight")
    return files.build(lambda: CrossModel(width, len(layers), len(first) // HEAD_WIDTH), state, what, dtype, device)


def _words(place: str) -> str:
    """Where the tokenizer is: in or beside weights that were given if it is there, else published."""
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    return str(folder) if place and Path(place).exists() and text.has_tokenizer(folder) else LAION_H
