"""HPSv2 (Wu et al. 2023, arXiv 2306.09341), version 2.0: CLIP ViT-H/14 trained on HPDv2; 100 times the cosine.

Images are not cropped: the whole one stands on a black square. Captions are cleaned as open_clip does.
"""

from diffpref.scorers.base import Precision, Scorer
from diffpref.scorers.parts.clip import LAION_H, VIT_H, Cosine
from diffpref.scorers.parts.pixels import PaddedPixels
from diffpref.scorers.parts.weights import MODEL_FILES

HPSV2 = Cosine(
    name="hpsv2",
    home="xswu/HPSv2",
    files=("HPS_v2_compressed.pt", *MODEL_FILES),
    architecture=VIT_H,
    tokenizer=LAION_H,
    cleaned=True,
    pixels=PaddedPixels,
    factor=100,
)


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "fp32") -> Scorer:
    """weights: `WEIGHTS[=TOKENIZER]`. Raises UserError for weights that cannot be read or are not of this kind."""
    return HPSV2.load(weights, device, precision)
