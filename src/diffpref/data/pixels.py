"""From a decoded image to the tensor that the VAE takes; the published script's resize and crop."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffpref.data.buckets import Size
from diffpref.data.images import MAX_STRETCH, BadImage


def to_pixels(image: Image.Image, size: Size, crop: str, left: float = 0.0, top: float = 0.0) -> Tensor:
    """An RGB image as (3, height, width) fp32 in [-1, 1] for a size (width, height), resized bilinearly, antialiased.

    crop "center": the image is scaled until it just covers the size, then its middle is kept (for a square,
    torchvision's Resize and CenterCrop, which Diffusion-DPO's train.py uses). "random": of the rectangles of that size
    the one at `left` and `top` in [0, 1), each place equally likely (its RandomCrop). "none": both sides are squeezed.
    Raises BadImage for a strip whose resized long side would fill the memory.
    """
    if crop == "none":
        return _tensor(image.resize(size, Image.Resampling.BILINEAR))
    width, height = image.size
    if max(width, height) > MAX_STRETCH * min(width, height):
        raise BadImage("too_long", f"{width} x {height} pixels, one side over {MAX_STRETCH} times the other")
    if width * size[1] <= height * size[0]:
        resized = (size[0], int(size[0] * height / width))
    else:
        resized = (int(size[1] * width / height), size[1])
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    room = resized[0] - size[0], resized[1] - size[1]
    if crop == "random":
        x, y = int(left * (room[0] + 1)), int(top * (room[1] + 1))
    else:
        x, y = round(room[0] / 2), round(room[1] / 2)
    return _tensor(image.crop((x, y, x + size[0], y + size[1])))


def _tensor(image: Image.Image) -> Tensor:
    array = np.array(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
