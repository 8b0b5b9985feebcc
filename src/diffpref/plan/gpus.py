"""GPUs by name: what their makers' data sheets say, and the share of it that training is assumed to reach.

Sources: NVIDIA's data sheets of A10, L4, A100, H100 (SXM) and H200 (SXM), and its architecture whitepapers of GA102
(RTX 3090), Ada (RTX 4080, 4090) and Blackwell (RTX 5090). The figures are for dense matrices, bf16 or fp16 with sums in
fp32, not the twice as high ones for sparse matrices or the higher ones of consumer cards for sums in fp16.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffpref.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    """memory: GB of 10^9 bytes, as sold. half, single: TFLOPS in bf16 and in fp32. bandwidth: GB/s of its memory."""

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("rtx-4080", 16, 97.5, 48.7, 717),
        Gpu("rtx-3090", 24, 71, 35.6, 936),
        Gpu("rtx-4090", 24, 165.2, 82.6, 1008),
        Gpu("a10", 24, 125, 31.2, 600),
        Gpu("l4", 24, 121, 30.3, 300),
        Gpu("rtx-5090", 32, 209.5, 104.8, 1792),
        Gpu("a100-40gb", 40, 312, 19.5, 1555),
        Gpu("a100-80gb", 80, 312, 19.5, 2039),
        Gpu("h100", 80, 989, 67, 3350),
        Gpu("h200", 141, 989, 67, 4800),
    )
}

# The share of a GPU's TFLOPS that the step's FLOPs are done at. Assumed, not measured: 31% is what this project aims at
# for SD1.5 and SDXL on an H200. Transformers are of larger matrix products, and taken to reach somewhat more.
ASSUMED_MFU = {"sd": 0.31, "sdxl": 0.31, "sd3": 0.35, "flux": 0.4, "qwenimage": 0.4}


def gpu(name: str) -> Gpu:
    """The GPU of a name, in any spelling of case, spaces and hyphens, or of an end that is but one's (4090).

    Raises UserError with the nearest name.
    """
    plain = {_plain(known): known for known in GPUS}
    fitting = [known for known in plain if _plain(name) and known.endswith(_plain(name))]
    if _plain(name) not in plain and len(fitting) != 1:
        raise UserError(f"--gpu: unknown {name!r}: {nearest(name.lower().replace(' ', '-'), GPUS)}")
    return GPUS[plain[_plain(name) if _plain(name) in plain else fitting[0]]]


def _plain(name: str) -> str:
    words = name.lower().replace("nvidia", "").replace("geforce", "")
    return "".join(letter for letter in words if letter.isalnum())
