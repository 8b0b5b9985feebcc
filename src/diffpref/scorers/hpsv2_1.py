"""HPSv2.1, the later weights of HPSv2 (arXiv 2306.09341): CLIP ViT-H/14; 100 times the cosine.

Its scores are of another scale than those of 2.0. Images and captions are treated the same.
"""

from diffpref.scorers.base import Precision, Scorer
from diffpref.scorers.parts.clip import LAION_H, VIT_H, Cosine
from diffpref.scorers.parts.pixels import PaddedPixels
from diffpref.scorers.parts.weights import MODEL_FILES

HPSV2_1 = Cosine(
    name="hpsv2.1",
    home="xswu/HPSv2",
    files=("HPS_v2.1_compressed.pt", *MODEL_FILES),
    architecture=VIT_H,
    tokenizer=LAION_H,
    cleaned=True,
    pixels=PaddedPixels,
    factor=100,
)


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "fp32") -> Scorer:
    """weights: `WEIGHTS[=TOKENIZER]`. Raises UserError for weights that cannot be read or are not of this kind."""
    return HPSV2_1.load(weights, device, precision)
