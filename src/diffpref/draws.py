"""Random draws as functions of position: (seed, epoch, place) -> a seed for one sample, and its generators.

Nothing here keeps state. So a sample's time, noise, flip and prompt drop are the same in any process, in any
micro-batch, and after any resume.
"""

import hashlib

import numpy as np
import torch

WINDOW = 8  # blocks whose samples are mixed


def draw_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words: equal parts give equal seeds, on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(draw: int, purpose: str) -> torch.Generator:
    """A fresh CPU generator for one purpose ("noise", "time", ...) of one sample."""
    return torch.Generator().manual_seed(draw_seed(draw, purpose))


def uniform(draw: int, purpose: str) -> float:
    """One number in [0, 1) for one purpose of one sample."""
    return (draw_seed(draw, purpose) >> 10) / 2**53


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` samples in an epoch: int64 (count,)."""
    return np.random.default_rng(draw_seed(seed, "order", epoch)).permutation(count)


def block_permutation(seed: int, epoch: int, count: int, block: int) -> np.ndarray:
    """An order that reads few blocks at a time: int64 (count,).

    Blocks of `block` neighbours (the last may be shorter) come in any order, and the samples of `WINDOW` blocks that
    come one after another are mixed.
    """
    blocks = np.random.default_rng(draw_seed(seed, "blocks", epoch)).permutation(-(-count // block))
    order = []
    for number in range(0, len(blocks), WINDOW):
        starts = [int(start) * block for start in blocks[number : number + WINDOW]]
        window = np.concatenate([np.arange(start, min(start + block, count)) for start in starts])
        order.append(np.random.default_rng(draw_seed(seed, "window", epoch, number)).permutation(window))
    return np.concatenate(order)
