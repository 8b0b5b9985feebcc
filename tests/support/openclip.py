"""Small inputs for both sides of a comparison with open_clip: weights, pictures, a vocabulary, captions.

Everything is a formula, so the environment that has open_clip and the one that has diffpref see the same. Only numpy,
PIL and torch are needed.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZES = [
    (224, 224),
    (512, 512),
    (640, 480),
    (333, 517),
    (1000, 225),
    (226, 601),
    (100, 60),
    (31, 224),
    (227, 224),
    (1024, 1023),
]
WORDS = ("a", "photo", "of", "the", "cat", "in", "on", "with", "red", "blue", "dog", "painting", "style")
WORDS += ("by", "night", "city", "sky", "highly", "detailed", "4k", "art")
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
SYMBOLS = [chr(byte) for byte in PRINTABLE] + [chr(256 + number) for number in range(256 - len(PRINTABLE))]
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
EMBED, LENGTH = 16, 77
VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"layers": 2, "width": 24, "heads": 2}


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours with sharp edges and a little structure in each pixel."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    red = (x * 7 + y * 3) % 256
    green = np.where((x // 16 + y // 16) % 2, 255, 0)
    blue = (x * y) % 251
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def merges() -> list[tuple[str, str]]:
    """Byte pairs that make a token of each of WORDS, from its left end."""
    found: dict[tuple[str, str], None] = {}
    for word in WORDS:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        left = letters[0]
        for letter in letters[1:]:
            found[left, letter] = None
            left += letter
    return list(found)


def symbols() -> list[str]:
    """The vocabulary in its order, but for the two special tokens at its end."""
    return [*SYMBOLS, *(f"{symbol}</w>" for symbol in SYMBOLS), *("".join(pair) for pair in merges())]


def write_tokenizer(folder: Path) -> Path:
    """The vocabulary in the two files that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: number for number, symbol in enumerate([*symbols(), *SPECIAL])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def wave(shape: tuple[int, ...], place: int) -> torch.Tensor:
    """Numbers in [-1, 1] that differ from place to place, without a random generator."""
    count = int(np.prod(shape)) if shape else 1
    steps = np.arange(count, dtype=np.float64)
    return torch.from_numpy(np.sin(steps * (1.618 + 0.0137 * place) + place)).float().reshape(shape)


def tiny_state() -> dict[str, torch.Tensor]:
    """Weights of a CLIP with two layers in each tower, in open_clip's naming and order."""
    state: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int, scale: float = 0.2, shift: float = 0.0) -> None:
        state[name] = shift + scale * wave(shape, len(state))

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width, shift=1.0)
        add(f"{name}.bias", width)

    def blocks(tower: str, width: int, layers: int) -> None:
        for number in range(layers):
            block = f"{tower}.resblocks.{number}"
            norm(f"{block}.ln_1", width)
            add(f"{block}.attn.in_proj_weight", 3 * width, width, scale=0.4)
            add(f"{block}.attn.in_proj_bias", 3 * width)
            add(f"{block}.attn.out_proj.weight", width, width)
            add(f"{block}.attn.out_proj.bias", width)
            norm(f"{block}.ln_2", width)
            add(f"{block}.mlp.c_fc.weight", 4 * width, width, scale=0.4)
            add(f"{block}.mlp.c_fc.bias", 4 * width)
            add(f"{block}.mlp.c_proj.weight", width, 4 * width)
            add(f"{block}.mlp.c_proj.bias", width)

    vision, text, patch = VISION["width"], TEXT["width"], VISION["patch_size"]
    add("positional_embedding", LENGTH, text)
    add("text_projection", text, EMBED)
    state["logit_scale"] = torch.tensor(4.6052)
    add("visual.class_embedding", vision)
    add("visual.positional_embedding", (VISION["image_size"] // patch) ** 2 + 1, vision)
    add("visual.proj", vision, EMBED)
    add("visual.conv1.weight", vision, 3, patch, patch)
    norm("visual.ln_pre", vision)
    blocks("visual.transformer", vision, VISION["layers"])
    norm("visual.ln_post", vision)
    blocks("transformer", text, TEXT["layers"])
    add("token_embedding.weight", len(symbols()) + 2, text)
    norm("ln_final", text)
    return state


def pieces() -> list[str]:
    """What captions are made of: words, and all that tokenizers have been seen to disagree about."""
    found = [*WORDS, "Portrait", "TRENDING", "artstation,", "8K", "f/1.8", "1girl", "it's", "don't", "I'LL", "they’ve"]
    found += ["猫と犬", "кошка", "γάτα", "חתול", "قطة", "बिल्ली", "แมว", "고양이"]
    found += ["ẞTRASSE", "İstanbul", "ﬁne", "ſ's", "'ſ"]
    found += ["!!!", "...", "—", "“quoted”", "(((weight:1.3)))", "<lora:x:1>", "::2", "--ar 16:9", "#tag", "@user"]
    found += ["_", "\\", "😀", "👩\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "👍🏽", "❤\ufe0f", "🇫🇷"]
    found += ["①", "½", "Ⅷ", "²", "٣", "५", "〇"]
    found += ["&amp;", "&lt;b&gt;", "&amp;amp;", "<i>&eacute;</i>", "<b>e&#769;", "&#x1F600;", "&#28;", "&nbsp;"]
    found += ["&copy", "&bogus;", "cafÃ©", "â€œhiâ€\x9d", "schÃ¶n", "ï»¿", "\ufeffbom", "â€™s", "L&AMP;R"]
    found += ["\x1b[31mred\x1b[0m", "\u00a0", "\u3000", "\t", "\n", "\r\n", "\u2028", "\x1c", "\x85"]
    found += ["\u200b", "\u200d", "\x00", "\x7f", "\x07", "\xad", "<|startoftext|>", "<|endoftext|>"]
    found += ["<start_of_text>", "<end_of_text>", "</w>", "!<end_of_text>", "<END_OF_TEXT>", "<ſtart_of_text>"]
    found += ["e\u0301", "A\u030a", "n\u0303o", "q\u0307\u0323", "\u0301alone", "가", "\u1100\u1161"]
    return [*found, "ＦＵＬＬ", "\u202eRTL\u202c", "x" * 40, "9" * 30, "ab" * 60]


def captions(count: int, seed: int = 0) -> list[str]:
    """Varied captions, among them empty ones and ones of thousands of characters."""
    numbers, parts, found = random.Random(seed), pieces(), ["", " ", *pieces()]
    blocks = [
        (0x20, 0x7E),
        (0xA1, 0x24F),
        (0x370, 0x3FF),
        (0x400, 0x4FF),
        (0x5D0, 0x5EA),
        (0x621, 0x64A),
        (0x905, 0x939),
    ]
    blocks += [
        (0x3041, 0x3096),
        (0x4E00, 0x9FA5),
        (0xAC00, 0xD7A3),
        (0x2000, 0x206F),
        (0x2190, 0x23FF),
        (0x1F300, 0x1F5FF),
    ]
    while len(found) < count:
        length = numbers.choice([1, 2, 4, 8, 16, 40]) if numbers.random() < 0.98 else 1500
        words = []
        for _ in range(length):
            kind = numbers.random()
            if kind < 0.5:
                words.append(numbers.choice(WORDS))
            elif kind < 0.8:
                words.append(numbers.choice(parts))
            else:
                low, high = numbers.choice(blocks)
                words.append("".join(chr(numbers.randint(low, high)) for _ in range(numbers.randint(1, 6))))
        found.append("".join(word + numbers.choice(["", " ", " ", " ", "  ", ", "]) for word in words))
    return found[:count]
