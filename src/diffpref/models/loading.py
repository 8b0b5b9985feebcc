"""From a model's configuration to its Backbone, on the device and in the precision that are there."""

import importlib

import torch

from diffpref.errors import UserError
from diffpref.train.config import ModelConfig
from diffpref.types import Backbone

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weights_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """The dtype of weights that do not train; raises UserError for fp16 on a CPU, which fails only in the forward."""
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("mixed_precision: fp16 does not run on a CPU; use bf16 or no")
    return DTYPES[mixed_precision]


def load_backbone(model: ModelConfig, device: torch.device, weights: torch.dtype, trainable: bool) -> Backbone:
    """The family's Backbone: `model.family` names its module."""
    family = importlib.import_module(f"diffpref.models.{model.family}")
    return family.load(model, device, weights, trainable)
