"""CLIP as transformers has it, from weights in either naming, and the scorers that are a cosine of its features.

Features are normalised and multiplied in fp32 whatever the network's precision: at PickScore 21 a bf16 number has only
every eighth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from diffpref.errors import UserError, first_line
from diffpref.scorers.base import Precision, Prepare, Reward
from diffpref.scorers.parts import text, weights
from diffpref.scorers.parts.openclip import from_open_clip, is_open_clip

if TYPE_CHECKING:
    from torch import Tensor


def _tower(width: int, layers: int, heads: int, act: str) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "hidden_act": act}


VIT_H = {
    "projection_dim": 1024,
    "vision_config": {**_tower(1280, 32, 16, "gelu"), "patch_size": 14, "image_size": 224},
    "text_config": _tower(1024, 24, 16, "gelu"),
}
VIT_L = {
    "projection_dim": 768,
    "vision_config": {**_tower(1024, 24, 16, "quick_gelu"), "patch_size": 14, "image_size": 224},
    "text_config": _tower(768, 12, 12, "quick_gelu"),
}
LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
OPENAI_L = "openai/clip-vit-large-patch14"
STANDARD = {LAION_H: VIT_H, OPENAI_L: VIT_L}
KNOWN = {
    "9a78ef8e8c73fd0df621682e7a8e8eb36c6916cb3c16b291a082ecd52ab79cc4": f"{LAION_H}/open_clip_pytorch_model.bin",
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb": f"{OPENAI_L}/model.safetensors",
}


@dataclass(eq=False)
class Clip:
    """A CLIP model. The features of the last images are kept, for several scorers may ask for those of one batch."""

    network: Any  # transformers' CLIPModel, whose declared types leave open what a loaded one has
    logit_scale: float
    identity: Mapping[str, str]
    _last: tuple[tuple[Tensor, ...], Tensor] | None = field(default=None, init=False)

    @property
    def size(self) -> int:
        """The side of its images in pixels."""
        return self.network.config.vision_config.image_size

    @property
    def length(self) -> int:
        """The most tokens of a caption."""
        return self.network.config.text_config.max_position_embeddings

    @property
    def width(self) -> int:
        """Of the features."""
        return self.network.config.projection_dim

    def features(self, prepared: Sequence[Tensor]) -> Tensor:
        """Features (n, width) fp32 of prepared images, which must not be changed afterwards."""
        import torch

        if self._last is None or not _same(self._last[0], prepared):
            weight = self.network.visual_projection.weight
            with torch.inference_mode():
                # already projected; doing so again would go unseen where the widths agree
                features = self.network.get_image_features(torch.stack(list(prepared)).to(weight)).pooler_output
                self._last = tuple(prepared), features.float()
        return self._last[1]

    def images(self, prepared: Sequence[Tensor]) -> Tensor:
        """Normalised features (n, width) fp32 of prepared images."""
        return _unit(self.features(prepared))

    def texts(self, tokens: Tensor) -> Tensor:
        """Normalised features (n, width) fp32 of captions' tokens, which may be padded by anything after the end."""
        import torch

        with torch.inference_mode():
            return _unit(self.network.get_text_features(tokens.to(self.network.device)).pooler_output.float())


def _same(kept: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    return len(kept) == len(given) and all(ours is theirs for ours, theirs in zip(kept, given, strict=True))


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


_loaded: WeakValueDictionary[tuple[str, str, str, Precision], Clip] = WeakValueDictionary()


def load_clip(
    place: str,
    files: Sequence[str],
    standard: Mapping[str, Any] | None,
    known: Mapping[str, str],
    scorer: str,
    device: str,
    precision: Precision,
) -> Clip:
    """A CLIP model from a file, a folder or a hub id; the same object as long as it is held and asked for again.

    standard: the architecture where no config.json of a CLIP lies beside the weights; without it a hub id is asked for
    one. Raises UserError where there are no weights, where their architecture is not told, and where they are not of
    that one.
    """
    dtype = weights.dtype_of(precision, device)
    file = weights.find(place, files, scorer)
    beside = file.parent / "config.json"
    if not standard and not Path(place).exists():
        beside = weights.look(place, ["config.json"], scorer) or beside
    config = _config(beside, scorer) or (_from(standard) if standard else None)
    if config is None:
        raise UserError(f"{scorer}: {file} has no config.json of a CLIP model beside it")
    total = weights.digest(file)
    key = total, str(config.to_dict()), device, precision
    if (loaded := _loaded.get(key)) is not None:
        return loaded
    state = weights.read(file, scorer)
    state = from_open_clip(state) if is_open_clip(state) else state
    identity = {
        "weights": weights.label(file, total, known, scorer),
        "sha256": total,
        "architecture": _architecture(config),
        "precision": precision,
    }
    network = _network(config, state, f"{scorer}: {file} does not fit {identity['architecture']}", dtype, device)
    clip = Clip(network, float(state["logit_scale"].float().exp()), identity)
    _loaded[key] = clip
    return clip


def _network(config: Any, state: Mapping[str, Tensor], what: str, dtype: Any, device: str) -> Any:
    from transformers import CLIPModel

    return weights.build(lambda: CLIPModel(config), state, what, dtype, device)


def _config(file: Path, scorer: str) -> Any:
    """The CLIPConfig of a config.json; None where it is not there or of no CLIP model."""
    from transformers import CLIPConfig

    if not file.is_file():
        return None
    try:
        content, _ = CLIPConfig.get_config_dict(file.parent)
        return CLIPConfig.from_dict(content) if content.get("model_type") == "clip" else None
    except Exception as error:  # transformers raises many kinds for JSON and for values
        raise UserError(f"{scorer}: {file} is no configuration of a CLIP model: {first_line(error)}") from error


def _from(standard: Mapping[str, Any]) -> Any:
    from transformers import CLIPConfig

    return CLIPConfig(**standard)


def _architecture(config: Any) -> str:
    vision, words = config.vision_config, config.text_config
    towers = (f"{each.hidden_size}x{each.num_hidden_layers}/{each.num_attention_heads}" for each in (vision, words))
    image = f"patches of {vision.patch_size} in {vision.image_size}"
    return f"CLIP {image}, vision and text {' and '.join(towers)}, shared {config.projection_dim}, {vision.hidden_act}"


@dataclass(frozen=True)
class Cosine:
    """A scorer that is a factor times the cosine between an image and its caption.

    home: where its weights are published, as which files. pixels: from the side in pixels to what is done to an image.
    factor: None for the model's own logit scale. known: names of weights by their SHA-256.
    """

    name: str
    home: str
    files: Sequence[str]
    architecture: Mapping[str, Any]
    tokenizer: str
    cleaned: bool
    pixels: Callable[[int], Prepare]
    factor: float | None
    known: Mapping[str, str] = field(default_factory=dict)

    def load(self, given: str | None, device: str, precision: Precision) -> Reward:
        """given: `WEIGHTS`, `WEIGHTS=TOKENIZER` or `=TOKENIZER`, for what is not to come from where it is published."""
        place, _, words = (given or "").partition("=")
        foreign = place not in ("", self.home) and not Path(place).exists()  # a hub id, which tells its architecture
        standard = None if foreign else self.architecture
        clip = load_clip(place or self.home, self.files, standard, self.known, self.name, device, precision)
        tokens = text.load_tokens(words or self._words(place), self.name, clip.length, self.cleaned)
        clip.network.text_model.eos_token_id = tokens.end  # old configurations name another one
        prepare = self.pixels(clip.size)
        factor = clip.logit_scale if self.factor is None else self.factor

        def measure(prepared: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
            return factor * (clip.images(prepared) * clip.texts(tokens(prompts))).sum(dim=-1)

        shown = "logit scale" if self.factor is None else f"{self.factor:g}"
        identity = {
            **clip.identity,
            "preprocessing": str(prepare),
            "text": str(tokens),
            "formula": f"{shown} x cosine, in fp32; 1",
        }
        return Reward(self.name, identity, prepare, measure)

    def _words(self, place: str) -> str:
        """Where the tokenizer is: in a folder that was given, else beside a file if it is there, else published."""
        if Path(place).is_dir() and place:
            return place
        if place and Path(place).is_file() and text.has_tokenizer(Path(place).parent):
            return str(Path(place).parent)
        return self.tokenizer
