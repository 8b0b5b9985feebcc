"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): CLIP ViT-H/14 trained on Pick-a-Pic; about 17 to 24.

The logit scale times the cosine. Images are as transformers' processor makes them and captions are not cleaned, as in
the published code. A softmax of scores means something across images of one prompt only.
"""

from diffpref.scorers.base import Precision, Scorer
from diffpref.scorers.parts.clip import LAION_H, VIT_H, Cosine
from diffpref.scorers.parts.pixels import ClipPixels
from diffpref.scorers.parts.weights import MODEL_FILES

PICKSCORE = Cosine(
    name="pickscore",
    home="yuvalkirstain/PickScore_v1",
    files=MODEL_FILES,
    architecture=VIT_H,
    tokenizer=LAION_H,
    cleaned=False,
    pixels=lambda size: ClipPixels("floor", size),
    factor=None,
)


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "fp32") -> Scorer:
    """weights: `WEIGHTS[=TOKENIZER]`. Raises UserError for weights that cannot be read or are not of this kind."""
    return PICKSCORE.load(weights, device, precision)
