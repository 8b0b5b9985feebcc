"""CLIP score by OpenAI's ViT-L/14 (Radford et al. 2021, arXiv 2103.00020), the cosine itself.

Images are as OpenAI's own code makes them, captions cleaned as there, which is what open_clip took over.
"""

from diffpref.scorers.base import Precision, Scorer
from diffpref.scorers.parts.clip import KNOWN, OPENAI_L, VIT_L, Cosine
from diffpref.scorers.parts.pixels import ClipPixels
from diffpref.scorers.parts.weights import MODEL_FILES

CLIP_L = Cosine(
    name="clip-l",
    home=OPENAI_L,
    files=MODEL_FILES,
    architecture=VIT_L,
    tokenizer=OPENAI_L,
    cleaned=True,
    pixels=lambda size: ClipPixels("even", size),
    factor=1,
    known=KNOWN,
)


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "fp32") -> Scorer:
    """weights: `WEIGHTS[=TOKENIZER]`. Raises UserError for weights that cannot be read or are not of this kind."""
    return CLIP_L.load(weights, device, precision)
