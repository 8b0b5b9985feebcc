"""From an image to a network's input, exactly as the published code does it.

The kinds differ in details that move scores: where a resize happens (PIL's on bytes, torch's on floats), which side it
fits, how an odd rest is cut off or filled up. Equal records do the same, so scorers of one pass share their work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipPixels:
    """CLIP's own: PIL's bicubic until the shorter side is `size`, the middle square, CLIP's mean and deviation.

    crop: what becomes of half a pixel. `floor` is transformers' image processor; `even`, to the even number, is
    torchvision's CenterCrop, which OpenAI's and ImageReward's code use. On square images they are the same.
    """

    crop: Literal["floor", "even"]
    size: int = 224

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, size, size) fp32."""
        image = rgb(image)
        width, height = image.size
        short = min(width, height)
        wide, high = (self.size if side == short else int(self.size * side / short) for side in (width, height))
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = self._cut(wide), self._cut(high)
        return normal(tensor(image.crop((left, top, left + self.size, top + self.size))))

    def _cut(self, side: int) -> int:
        rest = side - self.size
        return rest // 2 if self.crop == "floor" else round(rest / 2)

    def __str__(self) -> str:
        return f"RGB, PIL bicubic, shorter side {self.size}, middle square ({self.crop}), CLIP mean and deviation"


@dataclass(frozen=True)
class PaddedPixels:
    """HPSv2's: the whole image on a black square of side `size`, then CLIP's mean and deviation.

    Bicubic on floats, with antialiasing and unclamped, so that values leave [0, 1] beside sharp edges. The published
    transform leaves an image unfilled whose longer side is `size` already; here it gets its square as any other.
    """

    size: int = 224

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, size, size) fp32."""
        from torch.nn.functional import interpolate, pad

        pixels = tensor(rgb(image))
        scale = self.size / max(pixels.shape[1:])
        high, wide = (max(1, round(side * scale)) for side in pixels.shape[1:])
        if (high, wide) != tuple(pixels.shape[1:]):
            pixels = interpolate(pixels[None], (high, wide), mode="bicubic", align_corners=False, antialias=True)[0]
        left, top = (self.size - wide) // 2, (self.size - high) // 2
        return normal(pad(pixels, (left, self.size - wide - left, top, self.size - high - top)))

    def __str__(self) -> str:
        kind = "bicubic on floats, antialias, unclamped"
        return f"RGB, {kind}, longer side {self.size}, filled with black, CLIP mean and deviation"


def rgb(image: Image.Image) -> Image.Image:
    """An image as RGB."""
    return image if image.mode == "RGB" else image.convert("RGB")


def tensor(image: Image.Image) -> Tensor:
    """(3, height, width) fp32 in [0, 1]."""
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


def normal(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] with CLIP's mean and deviation taken out."""
    import torch

    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std
