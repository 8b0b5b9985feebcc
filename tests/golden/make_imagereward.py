"""Writes imagereward.json: what ImageReward's own code says with weights that are a formula, tiny and at full size.

It runs in an environment of its own, for the official code needs a transformers before 4.48: torch 2.13.0, numpy,
pillow, and without their dependencies transformers 4.47.1, tokenizers 0.21.0, huggingface-hub 0.27.1, timm 0.9.16,
fairscale 0.4.13 and torchvision 0.29.1.

    PYTHONPATH=tests:CHECKOUT python tests/golden/make_imagereward.py full

Without `full` the weights of full size, which need 6 GB of memory, are left out. CHECKOUT is
github.com/THUDM/ImageReward; its package is imported but for its own __init__, which needs datasets.
"""

import importlib
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from support import blip as given
from support.openclip import captions, picture, pieces

OPERATORS = torch.library.Library("torchvision", "DEF")  # its CPU build lacks them and does not import without
for name in ("nms", "qnms"):
    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

SIZES = [(224, 224), (333, 517), (100, 60)]
SEED = 4  # of the weights


def official() -> Any:
    """The module with the official class."""
    for package in ("ImageReward", "ImageReward.models"):
        module = ModuleType(package)
        module.__path__ = [str(Path(root) / package.replace(".", "/")) for root in sys.path if root]
        sys.modules[package] = module
    return importlib.import_module("ImageReward.ImageReward")


def tokenizer(folder: Path) -> Any:
    """What stands for BertTokenizer, whose vocabulary the official code would fetch: ours, through the same class."""
    from transformers import BertTokenizer

    class Ours:
        @staticmethod
        def from_pretrained(_: str) -> BertTokenizer:
            return BertTokenizer(str(given.write_vocabulary(folder) / "vocab.txt"))

    return Ours


def network(module: Any, folder: Path, tiny: bool) -> tuple[Any, dict[str, list[int]]]:
    """The official network with our weights, and the shapes of its weights."""
    pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    parts = importlib.import_module("ImageReward.models.BLIP.blip")
    vit = importlib.import_module("ImageReward.models.BLIP.vit")
    parts.BertTokenizer = tokenizer(folder)
    med = json.loads((folder / "med_config.json").read_text())
    kept = pretrain.create_vit, module.MLP
    if tiny:
        pretrain.create_vit = lambda *_: (vit.VisionTransformer(**given.VISION), given.VISION["embed_dim"])
        module.MLP = lambda _: kept[1](given.HEAD[0])
    model = module.ImageReward(str(folder / "med_config.json"), device="cpu").eval()
    pretrain.create_vit, module.MLP = kept
    shapes = {name: value.shape for name, value in model.state_dict().items() if not name.endswith("position_ids")}
    missing = model.load_state_dict(given.filled(shapes, SEED), strict=False).missing_keys
    assert all(name.endswith("position_ids") for name in missing), missing
    assert med["num_attention_heads"] == model.blip.text_encoder.config.num_attention_heads
    return model, {name: list(shape) for name, shape in shapes.items()}


def scores(model: Any, texts: list[str]) -> list[list[float]]:
    """The official score of each picture with each caption."""
    with torch.no_grad():
        return [[model.score(text, picture(*size)) for text in texts] for size in SIZES]


def main() -> None:
    """Make all and write it beside this script."""
    module = official()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "med_config.json").write_text(json.dumps(given.med_config()))
        model, shapes = network(module, folder, tiny=True)
        texts = [*pieces(), *captions(300)[-40:]]
        rows = model.blip.tokenizer(texts, padding="max_length", truncation=True, max_length=35).input_ids
        content = {
            "made_by": "tests/golden/make_imagereward.py, with ImageReward at c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb",
            "versions": {
                each: importlib.metadata.version(each) for each in ("torch", "transformers", "timm", "torchvision")
            },
            "sizes": SIZES,
            "seed": SEED,
            "shapes": shapes,
            "scores": scores(model, given.CAPTIONS),
            "tokens": rows,
        }
        if "full" in sys.argv:
            (folder / "med_config.json").write_text(json.dumps(given.med_config(given.FULL_MED)))
            model, shapes = network(module, folder, tiny=False)
            content["full"] = {"shapes": shapes, "scores": scores(model, given.CAPTIONS[:2])}
    Path(__file__).with_name("imagereward.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
