"""Linear heads on CLIP's image features: the aesthetic predictors, and a safetensors file of one's own.

A head is one linear layer, or several in a row with nothing between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffpref.errors import UserError, first_line
from diffpref.scorers.base import Precision, Reward
from diffpref.scorers.parts import weights
from diffpref.scorers.parts.clip import KNOWN, OPENAI_L, STANDARD, Clip, load_clip
from diffpref.scorers.parts.pixels import ClipPixels

if TYPE_CHECKING:
    from torch import Tensor

LAYER = re.compile(r"(?:[A-Za-z_]\w*\.)*(?:(\d+)\.)?(weight|bias)")


@dataclass(frozen=True)
class Head:
    """Layers in their order, each a weight (out, in) and a bias (out,), fp32; the last has one output."""

    layers: Sequence[tuple[Tensor, Tensor]]

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the features, of what is between the layers, and 1."""
        return self.layers[0][0].shape[1], *(weight.shape[0] for weight, _ in self.layers)

    def __call__(self, features: Tensor) -> Tensor:
        """One number (n,) fp32 for each of the features (n, width)."""
        from torch.nn.functional import linear

        for weight, bias in self.layers:
            features = linear(features, weight.to(features.device), bias.to(features.device))
        return features[:, 0]


def read_head(file: Path, scorer: str) -> Head:
    """The layers of a file: `weight` and `bias`, or several with numbers in their names, as a Sequential's are.

    Raises UserError that names the first key that is not of such a head.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in weights.read(file, scorer).items():
        match = LAYER.fullmatch(name)
        if not match:
            raise UserError(f"{scorer}: {file} is no linear head: {name} is neither a weight nor a bias")
        found.setdefault(int(match[1] or 0), {})[match[2]] = value.float()
    layers, last = [], None
    for number in sorted(found):
        weight, bias = found[number].get("weight"), found[number].get("bias")
        if weight is None or bias is None:
            raise UserError(f"{scorer}: {file} is no linear head: layer {number} needs a weight and a bias")
        weight = weight[None] if weight.ndim == 1 else weight
        if weight.ndim != 2 or bias.numel() != len(weight) or last not in (None, weight.shape[1]):
            raise UserError(f"{scorer}: {file} is no linear head: weight {number} has the shape {tuple(weight.shape)}")
        layers.append((weight, bias.reshape(-1)))
        last = len(weight)
    if last != 1:
        raise UserError(f"{scorer}: {file} is no linear head of one output: it has {last}")
    return Head(layers)


@dataclass(frozen=True)
class Aesthetic:
    """A published head on OpenAI's ViT-L/14. home: the hub id that has one of `files`, if there is one."""

    name: str
    home: str | None
    files: Sequence[str]
    published: str
    widths: tuple[int, ...]
    known: Mapping[str, str] = field(default_factory=dict)

    def load(self, given: str | None, device: str, precision: Precision) -> Reward:
        """given: `HEAD`, `HEAD=CLIP` or `=CLIP`; HEAD is a file, a hub id, or a folder that may hold the CLIP too."""
        place, _, model = (given or "").partition("=")
        place = place or self.home or ""
        if not place:
            raise UserError(
                f"{self.name}: the hub has no copy of its head by its authors; fetch {self.files[0]} from "
                f"{self.published} and give it as {self.name}=FILE"
            )
        file = weights.find(place, self.files, self.name)
        head = read_head(file, self.name)
        if head.widths != self.widths:
            raise UserError(f"{self.name}: {file} is a head of widths {head.widths}, where {self.widths} are expected")
        beside = Path(place).is_dir() and weights.look(place, weights.MODEL_FILES, self.name)
        clip = _clip(model or (place if beside else OPENAI_L), self.name, device, precision)
        total = weights.digest(file)
        identity = {"head": weights.label(file, total, self.known, self.name), "head sha256": total}
        return _reward(self.name, identity, head, clip, normalize=True, file=file)


def load_head(file: Path, name: str, model: str | None, device: str, precision: Precision) -> Reward:
    """A head of one's own.

    Its metadata tell `clip`, a hub id or folder, and `normalize`, whether features are divided by their length ("true",
    if it does not say). model: another place for the CLIP. Raises UserError for a file that is no such head.
    """
    if not file.is_file():
        raise UserError(f"cannot read the scorer {file}: there is no such file")
    head, metadata = read_head(file, name), _metadata(file)
    place = model or metadata.get("clip")
    if not place:
        raise UserError(f"the scorer {file}: its metadata do not tell `clip`; name the CLIP model as {file}=CLIP")
    normalize = metadata.get("normalize", "true")
    if normalize not in ("true", "false"):
        raise UserError(f"the scorer {file}: `normalize` of its metadata is {normalize!r}, neither true nor false")
    clip = _clip(place, name, device, precision)
    identity = {"head": file.name, "head sha256": weights.digest(file)}
    return _reward(name, identity, head, clip, normalize == "true", file)


def _clip(place: str, scorer: str, device: str, precision: Precision) -> Clip:
    return load_clip(place, weights.MODEL_FILES, STANDARD.get(place), KNOWN, scorer, device, precision)


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the scorer {file}: {first_line(error)}") from error


def _reward(name: str, identity: Mapping[str, str], head: Head, clip: Clip, normalize: bool, file: Path) -> Reward:
    if head.widths[0] != clip.width:
        raise UserError(f"{name}: {file} is a head for features of width {head.widths[0]}; the CLIP has {clip.width}")
    prepare = ClipPixels("even", clip.size)

    def measure(prepared: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return head(clip.images(prepared) if normalize else clip.features(prepared))

    kind = "normalised" if normalize else "raw"
    formula = f"linear layers {'-'.join(map(str, head.widths))} on {kind} image features, in fp32; 1"
    given = {**clip.identity, **identity, "preprocessing": str(prepare), "text": "none", "formula": formula}
    return Reward(name, given, prepare, measure)
