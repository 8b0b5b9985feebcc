"""Writes mps.json: what MPS's own code says with tiny weights that are random from a fixed stream.

It runs in an environment of its own: torch 2.13.0, numpy, pillow, and without their dependencies transformers 4.47.1,
tokenizers 0.21.0, huggingface-hub 0.27.1 and einops 0.8.2.

    PYTHONPATH=tests:CHECKOUT python tests/golden/make_mps.py

CHECKOUT is github.com/Kwai-Kolors/MPS. Its forward takes two images of a prompt: the same one is given as both. It
halves the precision, which is left out here, for the weights are fp32.
"""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from support import blip, clip, openclip
from torch.nn.functional import cosine_similarity

SIZES = [(32, 32), (50, 77), (100, 60)]
SEED = 6
LAYERS, HEADS = 2, 3
CAPTIONS = [*blip.CAPTIONS[:2], "a cat with shape, color, hair and things", "highly detailed art by night " * 20]
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)


def official() -> Any:
    """The official network, tiny, with our weights, in fp32."""
    base = ModuleType("trainer.models.base_model")
    base.BaseModelConfig = object  # its own file needs a configuration library
    sys.modules[base.__name__] = base
    from trainer.models.clip_model import CLIPModel, XCLIPModel
    from trainer.models.cross_modeling import Cross_model
    from transformers import CLIPConfig

    model = CLIPModel.__new__(CLIPModel)
    torch.nn.Module.__init__(model)
    model.model = XCLIPModel(CLIPConfig(**clip.config()))
    model.cross_model = Cross_model(dim=openclip.EMBED, layer_num=LAYERS, heads=HEADS)
    torch.Tensor.half = torch.Tensor.float
    return model.eval()


def main() -> None:
    """Make all and write it beside this script."""
    model = official()
    buffers = (".bias", "inv_freq")
    shapes = {
        name: value.shape
        for name, value in model.state_dict().items()
        if not name.endswith("position_ids") and not (name.startswith("cross") and name.endswith(buffers))
    }
    state = blip.filled(shapes, SEED)
    state["model.logit_scale"] = torch.tensor(4.6052)
    left = model.load_state_dict(state, strict=False).missing_keys
    assert all(name.endswith((*buffers, "position_ids")) for name in left), left
    with tempfile.TemporaryDirectory() as name:
        from transformers import CLIPImageProcessor, CLIPTokenizer

        folder = openclip.write_tokenizer(Path(name))
        words = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=openclip.LENGTH)
    model.model.text_model.eos_token_id = words.eos_token_id
    side = openclip.VISION["image_size"]
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def tokenize(text: str) -> torch.Tensor:
        given = {"padding": "max_length", "truncation": True, "max_length": openclip.LENGTH, "return_tensors": "pt"}
        return words(text, **given).input_ids

    found = []
    with torch.no_grad():
        for size in SIZES:
            pixels = processor(openclip.picture(*size), return_tensors="pt")["pixel_values"]
            found.append([])
            for caption in CAPTIONS:
                text, first, _ = model(tokenize(caption), torch.cat([pixels, pixels]), tokenize(CONDITION))
                found[-1].append(float(model.logit_scale.exp() * cosine_similarity(text, first)))
    content = {
        "made_by": "tests/golden/make_mps.py, with MPS at be9027f3e9097a4a8b1e0be5991d0096aa8abc4b",
        "versions": {each: importlib.metadata.version(each) for each in ("torch", "transformers", "einops")},
        "seed": SEED,
        "sizes": SIZES,
        "captions": CAPTIONS,
        "heads": HEADS,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "scores": found,
    }
    Path(__file__).with_name("mps.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
