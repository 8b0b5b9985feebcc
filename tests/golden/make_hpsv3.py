"""Writes hpsv3.json: what HPSv3's own code says with tiny weights that are random from a fixed stream.

It runs in an environment of its own: torch 2.13.0, numpy, pillow, and without their dependencies transformers 4.45.2
(to which hpsv3 1.0.0 is pinned), tokenizers 0.20.3 and huggingface-hub 0.27.1.

    PYTHONPATH=tests python tests/golden/make_hpsv3.py PACKAGE

PACKAGE is the folder `hpsv3` of the published wheel hpsv3 1.0.0. Of its files only the network's class and the
functions that resize an image are run, for the files themselves need training libraries; of the instruction the sum is
kept, and one of ours is asked. The network goes to bf16 as in the package and its weights back to fp32, which leaves
the rotary frequencies as the package has them.
"""

import ast
import hashlib
import importlib.metadata
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

import torch
from PIL import Image
from support import qwen as given
from support.openclip import captions, picture, pieces

CHAT = (  # Qwen2-VL's published template, as far as a chat of one image and one text uses it
    "{% for message in messages %}{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def parts(file: Path, names: set[str], known: dict[str, Any]) -> dict[str, Any]:
    """The functions, classes and constants of these names in a file, which see those known."""
    found = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if {getattr(node, "name", None), *targets} & names:
            found.append(node)
    exec(compile(ast.Module(found, []), str(file), "exec"), known)
    return known


def network(package: Path, mark: int) -> tuple[Any, dict[str, list[int]]]:
    """The official network with our weights, and their shapes."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    known = {"torch": torch, "nn": torch.nn, "List": list, "Optional": Optional}
    known["Qwen2VLForConditionalGeneration"] = Qwen2VLForConditionalGeneration
    kind = parts(package / "model" / "qwen2vl_trainer.py", {"Qwen2VLRewardModelBT"}, known)["Qwen2VLRewardModelBT"]
    config = Qwen2VLConfig(**given.config(), pad_token_id=len(given.symbols()))
    model = kind(config, output_dim=2, reward_token="special", special_token_ids=[mark], rm_head_type="ranknet")
    model.to(torch.bfloat16).to(torch.float32)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(given.state(shapes), strict=True)
    return model.eval(), shapes


def main() -> None:
    """Make all and write it beside this script."""
    from transformers import Qwen2TokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor

    package = Path(sys.argv[1])
    names = {"INSTRUCTION", "prompt_with_special_token"}
    text = parts(package / "dataset" / "data_collator_qwen.py", names, {})
    names = {"IMAGE_FACTOR", "MIN_PIXELS", "MAX_PIXELS", "MAX_RATIO", "fetch_image", "smart_resize"}
    names |= {f"{each}_by_factor" for each in ("round", "ceil", "floor")}
    fetch = parts(package / "dataset" / "utils.py", names, {"math": math, "torch": torch, "Image": Image})[
        "fetch_image"
    ]
    with tempfile.TemporaryDirectory() as name:
        tokenizer = Qwen2TokenizerFast.from_pretrained(given.write_tokenizer(Path(name)))
    tokenizer.add_special_tokens({"additional_special_tokens": [given.MARK]})
    tokenizer.padding_side = "right"
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=CHAT)
    model, shapes = network(package, tokenizer.convert_tokens_to_ids(given.MARK))
    side = {"min_pixels": 256 * 28 * 28, "max_pixels": 256 * 28 * 28}
    images = [{"type": "image", "image": picture(*size), **side} for size in given.SIZES]
    found, sums = [], []
    for image in images:
        found.append([])
        for caption in given.CAPTIONS:
            asked = given.INSTRUCTION.format(text_prompt=caption)
            chat = [{"role": "user", "content": [image, {"type": "text", "text": asked}]}]
            inputs = processor(
                text=processor.apply_chat_template([chat], tokenize=False, add_generation_prompt=True),
                images=[fetch(image)],
                padding=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                found[-1].append(model(return_dict=True, **inputs)["logits"][0].tolist())
        pixels = inputs["pixel_values"].double()
        weight = torch.linspace(0, 1, pixels.numel(), dtype=torch.float64).reshape(pixels.shape)
        sums.append([*inputs["image_grid_thw"][0].tolist(), float(pixels.sum()), float((pixels * weight).sum())])
    texts = [*pieces(), *captions(300)[-40:]]
    asked = text["INSTRUCTION"] + text["prompt_with_special_token"]
    content = {
        "made_by": "tests/golden/make_hpsv3.py, with hpsv3 1.0.0",
        "versions": {each: importlib.metadata.version(each) for each in ("torch", "transformers", "tokenizers")},
        "shapes": shapes,
        "scores": found,
        "pixels": sums,
        "instruction": hashlib.sha256(asked.encode()).hexdigest(),
        "tokens": [tokenizer(each).input_ids for each in texts],
    }
    Path(__file__).with_name("hpsv3.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
