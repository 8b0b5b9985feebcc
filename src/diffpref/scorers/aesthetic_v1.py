"""LAION's first aesthetic predictor: one linear layer on the normalised image features of OpenAI's ViT-L/14.

The published figures of Diffusion-DRO are of this one, about 5 to 6. The prompt has no part in it.
"""

from diffpref.scorers.base import Precision, Scorer
from diffpref.scorers.parts.heads import Aesthetic

AESTHETIC_V1 = Aesthetic(
    name="aesthetic-v1",
    home=None,
    files=("sa_0_4_vit_l_14_linear.pth",),
    published="the repository LAION-AI/aesthetic-predictor",
    widths=(768, 1),
)


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "fp32") -> Scorer:
    """weights: `HEAD[=CLIP]`. Raises UserError for weights that cannot be read or are not of this kind."""
    return AESTHETIC_V1.load(weights, device, precision)
