"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP with a head of linear layers; about -2 to 2.

The caption's first token, which has attended to the image, goes through five linear layers without activations, and the
result is brought to mean 0 and deviation 1 by the published constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffpref.errors import UserError
from diffpref.scorers.base import Precision, Reward, Scorer
from diffpref.scorers.parts import bert, blip
from diffpref.scorers.parts import weights as files
from diffpref.scorers.parts.heads import Head
from diffpref.scorers.parts.pixels import ClipPixels

if TYPE_CHECKING:
    from torch import Tensor

NAME = "imagereward"
HOME = "THUDM/ImageReward"
FILES = ("ImageReward.pt", "ImageReward.safetensors")
LENGTH = 35  # tokens of a caption
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
LAYERS = ("0", "2", "4", "6", "7")  # of the head; dropout stands between


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "fp32") -> Scorer:
    """weights: `WEIGHTS[=TOKENIZER]`; a med_config.json beside the weights tells the text model's sizes.

    Raises UserError for weights that cannot be read or are not of this kind.
    """
    import torch

    place, _, words = (weights or "").partition("=")
    dtype = files.dtype_of(precision, device)
    file = files.find(place or HOME, FILES, NAME)
    med = blip.read_med(_beside(place, file), NAME)
    what = f"{NAME}: {file} is no ImageReward"
    vision_state, text_state, head_state = blip.parted(files.read(file, NAME), what)
    vision = blip.build_vision(vision_state, what, dtype, device)
    width = vision.config.hidden_size
    text = blip.build_text(text_state, med, width, what, dtype, device)
    head = _head(head_state, text.config.hidden_size, what)
    tokens = bert.load_bert_tokens(words or _words(place), NAME, LENGTH)
    if tokens.size > text.config.vocab_size:
        raise UserError(
            f"{NAME}: the vocabulary has {tokens.size} words, the model {text.config.vocab_size}; "
            f"name another as {NAME}=WEIGHTS=TOKENIZER"
        )

    def measure(prepared: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        ids, mask = (each.to(device) for each in tokens(prompts))
        with torch.inference_mode():
            seen = vision(torch.stack(list(prepared)).to(device, dtype)).last_hidden_state
            states = text(ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False)
            return (head(states.last_hidden_state[:, 0].float()) - MEAN) / DEVIATION

    total = files.digest(file)
    prepare = ClipPixels("even", blip.side(vision))
    identity = {
        "weights": files.label(file, total, {}, NAME),
        "sha256": total,
        "architecture": f"BLIP vision {_tower(vision.config)}, eps {blip.EPS:g}, text {_tower(text.config)}",
        "precision": precision,
        "preprocessing": str(prepare),
        "text": str(tokens),
        "formula": f"(linear layers of the first token, in fp32, - {MEAN}) / {DEVIATION}; 1",
    }
    return Reward(NAME, identity, prepare, measure)


def _tower(config: object) -> str:
    width, layers, heads = (
        getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    return f"{width}x{layers}/{heads}"


def _beside(place: str, file: Path) -> Path | None:
    """The med_config.json beside local weights, or that of a hub id; none for the published ones, which are known."""
    if not Path(place).exists():
        return files.look(place, ["med_config.json"], NAME)
    beside = file.parent / "med_config.json"
    return beside if place and beside.is_file() else None


def _words(place: str) -> str:
    """Where the vocabulary is: beside weights that were given if it is there, else published."""
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    return str(folder) if place and Path(place).exists() and bert.has_vocabulary(folder) else bert.HOME


def _head(state: Mapping[str, Tensor], width: int, what: str) -> Head:
    """The head's layers in fp32, which must go from a width to one number."""
    layers = []
    for layer in LAYERS:
        weight, bias = state.get(f"{layer}.weight"), state.get(f"{layer}.bias")
        if weight is None or bias is None:
            raise UserError(f"{what}: {blip.HEAD}{layer}.{'bias' if weight is not None else 'weight'} is missing")
        if weight.shape != (len(bias), width):
            expected = (len(bias), width)
            raise UserError(
                f"{what}: {blip.HEAD}{layer}.weight has the shape {tuple(weight.shape)}, where {expected} is expected"
            )
        layers.append((weight.float(), bias.float()))
        width = len(bias)
    if strange := [name for name in state if name.partition(".")[0] not in LAYERS]:
        raise UserError(f"{what}: {blip.HEAD}{strange[0]} is unexpected")
    if width != 1:
        raise UserError(f"{what}: its head gives {width} numbers, where one is expected")
    return Head(layers)
