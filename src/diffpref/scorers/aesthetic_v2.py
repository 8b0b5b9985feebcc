"""LAION's improved aesthetic predictor, `sac+logos+ava1-l14-linearMSE`: five linear layers without activations.

They stand on the normalised image features of OpenAI's ViT-L/14. About 5 to 6; the prompt has no part in it.
"""

from diffpref.scorers.base import Precision, Scorer
from diffpref.scorers.parts.heads import Aesthetic

HEAD = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_V2 = Aesthetic(
    name="aesthetic-v2",
    home="camenduru/improved-aesthetic-predictor",  # a copy; its sum is the original's
    files=(HEAD,),
    published="the repository christophschuhmann/improved-aesthetic-predictor",
    widths=(768, 1024, 128, 64, 16, 1),
    known={"21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0": HEAD},
)


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "fp32") -> Scorer:
    """weights: `HEAD[=CLIP]`. Raises UserError for weights that cannot be read or are not of this kind."""
    return AESTHETIC_V2.load(weights, device, precision)
