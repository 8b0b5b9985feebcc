"""Writes openclip.json: what open_clip and HPSv2's own code say of small inputs.

It runs in an environment of its own, which has torch 2.13.0, numpy, pillow, and without their dependencies
open_clip_torch 3.3.0, timm and torchvision, besides ftfy and regex:

    PYTHONPATH=tests python tests/golden/make_openclip.py HPSV2

HPSV2 is a checkout of github.com/tgxs002/HPSv2, of which transform.py alone is run.
"""

import gzip
import hashlib
import importlib
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from support import openclip as given

OPERATORS = torch.library.Library("torchvision", "DEF")  # its CPU build lacks them and does not import without
for name in ("nms", "qnms"):
    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
from open_clip.transform import image_transform  # noqa: E402

STRIDE = 45


def hpsv2_transform(checkout: Path) -> Any:
    """HPSv2's own transform at 224 pixels."""
    package = ModuleType("hpsv2_open_clip")
    package.__path__ = [str(checkout / "hpsv2" / "src" / "open_clip")]
    sys.modules[package.__name__] = package
    module = importlib.import_module(f"{package.__name__}.transform")
    return module.image_transform(224, is_train=False, resize_longest_max=True)


def transforms(checkout: Path) -> dict[str, Any]:
    """The published transforms by the names of ours."""
    return {"even": image_transform(224, is_train=False), "padded": hpsv2_transform(checkout)}


def pixels(checkout: Path) -> list[dict[str, Any]]:
    """Some pixels of each picture, and sums in which each has a weight of its own."""
    found = []
    for kind, transform in transforms(checkout).items():
        for size in given.SIZES:
            prepared = transform(given.picture(*size))
            sums = [float((prepared.double() * given.wave(tuple(prepared.shape), place)).sum()) for place in (1, 2)]
            sample = prepared[:, ::STRIDE, ::STRIDE].flatten().tolist()
            found.append({"kind": kind, "size": size, "shape": list(prepared.shape), "sums": sums, "sample": sample})
    return found


def network(quick: bool) -> Any:
    """open_clip's CLIP with the tiny weights."""
    text = {**given.TEXT, "context_length": given.LENGTH, "vocab_size": len(given.symbols()) + 2}
    model = open_clip.CLIP(given.EMBED, dict(given.VISION), text, quick_gelu=quick)
    model.load_state_dict(given.tiny_state(), strict=True)
    return model.eval()


def tokenizer(folder: Path) -> Any:
    """open_clip's tokenizer with the small vocabulary."""
    file = folder / "bpe.txt.gz"
    lines = ["#version: 0.2", *(" ".join(pair) for pair in given.merges())]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return open_clip.SimpleTokenizer(bpe_path=str(file))


def features(tokenize: Any) -> dict[str, Any]:
    """Features of two prepared images and of captions, and their cosines, for both kinds of activation."""
    images = given.wave((2, 3, given.VISION["image_size"], given.VISION["image_size"]), 3) * 2
    texts = ["a photo of the cat", "A red Dog &amp; <b>blue</b> sky  at NIGHT", "", "highly detailed art " * 60]
    found: dict[str, Any] = {"captions": texts}
    with torch.no_grad():
        for kind in ("gelu", "quick_gelu"):
            model = network(kind == "quick_gelu")
            image, text = model.encode_image(images), model.encode_text(tokenize(texts))
            cosine = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
            found[kind] = {"images": image.tolist(), "texts": text.tolist(), "cosines": cosine.tolist()}
    return found


def ends(row: list[int]) -> list[int]:
    """A row of tokens up to the end that closes it, without the zeros that fill it up."""
    while row and row[-1] == 0:
        row = row[:-1]
    return row


def digest(rows: list[list[int]]) -> str:
    """A sum of rows of tokens."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def tokens(tokenize: Any) -> dict[str, Any]:
    """Tokens of the pieces that captions are made of, and sums of those of many captions, a thousand at a time."""
    rows = [ends(row) for row in tokenize(given.captions(10_000)).tolist()]
    sums = [digest(rows[start : start + 1000]) for start in range(0, len(rows), 1000)]
    pieces = [ends(row) for row in tokenize(given.pieces()).tolist()]
    return {"pieces": pieces, "sums": sums}


def main() -> None:
    """Make all and write it beside this script."""
    used = {each: importlib.metadata.version(each) for each in ("open_clip_torch", "torchvision", "ftfy", "regex")}
    with tempfile.TemporaryDirectory() as folder:
        tokenize = tokenizer(Path(folder))
        content = {
            "made_by": "tests/golden/make_openclip.py, with HPSv2 at 866735ecaae999fa714bd9edfa05aa2672669ee3",
            "versions": {"torch": torch.__version__, **used},
            "stride": STRIDE,
            "pixels": pixels(Path(sys.argv[1])),
            "features": features(tokenize),
            "tokens": tokens(tokenize),
        }
    Path(__file__).with_name("openclip.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
