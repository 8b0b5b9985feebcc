"""CLIP score by LAION's ViT-H/14 (arXiv 2210.08402), the cosine itself; about 0.34.

Images and captions are treated as HPSv2 treats them, for so do the published tables of Diffusion-DPO's successors.
"""

from diffpref.scorers.base import Precision, Scorer
from diffpref.scorers.parts.clip import KNOWN, LAION_H, VIT_H, Cosine
from diffpref.scorers.parts.pixels import PaddedPixels
from diffpref.scorers.parts.weights import MODEL_FILES

CLIP_H = Cosine(
    name="clip-h",
    home=LAION_H,
    files=MODEL_FILES,
    architecture=VIT_H,
    tokenizer=LAION_H,
    cleaned=True,
    pixels=PaddedPixels,
    factor=1,
    known=KNOWN,
)


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "fp32") -> Scorer:
    """weights: `WEIGHTS[=TOKENIZER]`. Raises UserError for weights that cannot be read or are not of this kind."""
    return CLIP_H.load(weights, device, precision)
