"""Compares our scorers with open_clip itself, whole: every pixel, ten thousand captions, networks of the true size.

It runs in the environment of make_openclip.py, which then needs transformers, accelerate and safetensors too, takes
minutes, 12 GB of memory and 8 GB of disk, and prints the greatest differences:

    PYTHONPATH=src:tests python tests/golden/check_openclip.py HPSV2 [pixels] [tokens] [hpsv2] [clip-l]
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from make_openclip import open_clip, transforms
from support import openclip as given

from diffpref.scorers.base import Reward, load_scorer
from diffpref.scorers.parts.clip import VIT_H, VIT_L, load_clip
from diffpref.scorers.parts.pixels import ClipPixels, PaddedPixels
from diffpref.scorers.parts.text import load_tokens

PROMPTS = ["a photo of a cat", "A red Dog &amp; a blue sky, highly detailed", "", "night city by the sea " * 30]


def pixels(checkout: Path) -> None:
    """Every pixel of every picture."""
    ours = {"even": ClipPixels("even"), "padded": PaddedPixels()}
    for kind, transform in transforms(checkout).items():
        worst = 0.0
        for size in given.SIZES:
            theirs, mine = transform(given.picture(*size)), ours[kind](given.picture(*size))
            mine = mine if mine.shape == theirs.shape else mine[:, :, 96:127]
            worst = max(worst, float((theirs - mine).abs().max()))
        print(f"pixels {kind}: {len(given.SIZES)} sizes, greatest difference {worst:.1e}")


def write_vocabulary(folder: Path) -> Path:
    """open_clip's vocabulary in the files that transformers reads."""
    lines = (
        gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes())
        .decode()
        .split("\n")[1 : 49152 - 256 - 2 + 1]
    )
    pairs = [tuple(line.split()) for line in lines]
    symbols = [*given.SYMBOLS, *(f"{each}</w>" for each in given.SYMBOLS), *("".join(pair) for pair in pairs)]
    vocabulary = {symbol: number for number, symbol in enumerate([*symbols, *given.SPECIAL])}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


def tokens(vocabulary: Path) -> None:
    """Captions under the true vocabulary, by open_clip and by us with and without its cleaning."""
    cleaned, plain = (load_tokens(str(vocabulary), "check", 77, cleaned=each) for each in (True, False))
    theirs = open_clip.get_tokenizer("ViT-H-14")
    for seed in (0, 1):
        texts = given.captions(10_000, seed)
        differ = {"cleaned": 0, "plain": 0}
        for text, row in zip(texts, theirs(texts).tolist(), strict=True):
            for kind, tokens in (("cleaned", cleaned), ("plain", plain)):
                mine = tokens([text])[0].tolist()
                differ[kind] += mine + [0] * (77 - len(mine)) != row
        print(f"tokens, seed {seed}: of {len(texts)} captions {differ['cleaned']} differ, {differ['plain']} uncleaned")


def network(name: str, model: str, architecture: Any, vocabulary: Path, folder: Path) -> None:
    """Random weights of the true size: features, cosines and scores, in batches and alone, in fp32 and bf16."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(model).eval()
    file = folder / f"{name}.pt"
    torch.save({"state_dict": theirs.state_dict()}, file)
    wanted = f"{name}={file}={vocabulary}"
    scorer = load_scorer(wanted)
    assert isinstance(scorer, Reward)
    clip = load_clip(str(file), (), architecture, {}, "check", "cpu", "fp32")
    pictures = [given.picture(*size) for size in given.SIZES[1:5]]
    prepared = [scorer.prepare(picture) for picture in pictures]
    ids = open_clip.get_tokenizer(model)(PROMPTS)
    with torch.no_grad():
        image, text = theirs.encode_image(torch.stack(prepared)), theirs.encode_text(ids)
        units = [torch.nn.functional.normalize(each, dim=-1) for each in (image, text)]
    del theirs
    mine = clip.images(prepared), clip.texts(ids)
    cosines = [(units[0] * units[1]).sum(-1), (mine[0] * mine[1]).sum(-1)]
    for what, a, b in (("image", units[0], mine[0]), ("text", units[1], mine[1]), ("cosine", *cosines)):
        print(f"{name}, {what} of random {model}: greatest difference {float((a - b).abs().max()):.1e}")
    together = torch.tensor(scorer(pictures, PROMPTS))
    alone = torch.tensor([scorer([each], [prompt])[0] for each, prompt in zip(pictures, PROMPTS, strict=True)])
    print(f"{name}: scores {[round(float(each), 4) for each in together]}")
    print(f"{name}: batch of 4 and batches of 1 differ by {float((together - alone).abs().max()):.1e}")
    kind = "pickscore" if architecture is VIT_H else name
    full, half = (load_scorer(f"{kind}={file}={vocabulary}", precision=each) for each in ("fp32", "bf16"))
    moved = torch.tensor(full(pictures, PROMPTS)) - torch.tensor(half(pictures, PROMPTS))
    print(f"{kind} of these weights: bf16 moves scores by at most {float(moved.abs().max()):.1e}")


def main() -> None:
    """Compare what was named, or all."""
    checks = set(sys.argv[2:]) or {"pixels", "tokens", "hpsv2", "clip-l"}
    if "pixels" in checks:
        pixels(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as place:
        vocabulary = write_vocabulary(Path(place) / "vocabulary")
        if "tokens" in checks:
            tokens(vocabulary)
        if "clip-l" in checks:
            network("clip-l", "ViT-L-14-quickgelu", VIT_L, vocabulary, Path(place))
        if "hpsv2" in checks:
            network("hpsv2", "ViT-H-14", VIT_H, vocabulary, Path(place))


if __name__ == "__main__":
    main()
