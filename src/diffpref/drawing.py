"""A model as images are drawn of it: with LoRA weights, another U-Net, or what guides from the other side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffpref.errors import UserError

if TYPE_CHECKING:
    from diffpref.types import Backbone


@dataclass(frozen=True)
class ModelOptions:
    """What is put upon a model, as `generate` and `evaluate` take it."""

    lora: tuple[str, ...] = ()
    """LoRA weights: a file, or the final/ folder of a LoRA run; several are added up."""
    lora_scales: tuple[float, ...] = ()
    """What each of them is multiplied by; 1 when not given."""
    unet: str | None = None
    """Another U-Net: a folder, or a pipeline folder or hub id that holds one."""
    negative: str | None = None
    """What guides from the other side (NPO): LoRA weights, added to the model as it is drawn from, or a pipeline."""
    merge_weight: float = 0.0
    """The share of --lora and --unet that is taken out from under --negative's LoRA weights again."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"

    def check(self) -> None:
        """Raise UserError for options that do not fit one another."""
        if len(self.lora_scales) not in (0, len(self.lora)):
            raise UserError(f"--lora-scales: {len(self.lora_scales)} numbers for {len(self.lora)} of --lora")
        if not 0 <= self.merge_weight <= 1:
            raise UserError(f"--merge-weight: {self.merge_weight} is not from 0 to 1")
        if self.merge_weight and not (self.negative and (self.lora or self.unet)):
            raise UserError(
                "--merge-weight: there is nothing to take out; it goes with --negative and --lora or --unet"
            )


@dataclass(frozen=True)
class Drawn:
    """A loaded model. name: digits that change with its weights, so that images of two models share no folder."""

    backbone: Backbone
    negative: Backbone | None
    name: str


def load_drawn(pretrained: str, options: ModelOptions) -> Drawn:
    """The model with its options, on the GPU if there is one. Raises UserError where a part of it does not load."""
    from diffpref.evaluate.generate import fingerprint
    from diffpref.models.loading import best_device, load_backbone, load_negative, weights_dtype
    from diffpref.train.config import ModelConfig

    device = best_device()
    model = ModelConfig(pretrained, lora=options.lora, lora_scales=options.lora_scales, unet=options.unet)
    weights = weights_dtype(options.mixed_precision, device)
    backbone = load_backbone(model, device, weights, trainable=False)
    name, negative = fingerprint(backbone), None
    if options.negative:
        negative = load_negative(model, backbone, options.negative, options.merge_weight, weights)
        name = f"{name} against {fingerprint(negative)}"
    return Drawn(backbone, negative, name)
