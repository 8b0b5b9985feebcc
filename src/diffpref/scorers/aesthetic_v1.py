"""LAION's first aesthetic predictor: one linear layer on the normalised image features of OpenAI's ViT-L/14.

The published figures of Diffusion-DRO are of this one, about 5 to 6. The prompt has no part in it.
"""

from diffpref.scorers.base import Precision, Scorer
from diffpref.scorers.parts.heads import Aesthetic

HEAD = "sa_0_4_vit_l_14_linear.pth"
AESTHETIC_V1 = Aesthetic(
    name="aesthetic-v1",
    home=None,
    files=(HEAD,),
    published="the repository LAION-AI/aesthetic-predictor",
    widths=(768, 1),
    known={"2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba": HEAD},
)


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "fp32") -> Scorer:
    """weights: `HEAD[=CLIP]`. Raises UserError for weights that cannot be read or are not of this kind."""
    return AESTHETIC_V1.load(weights, device, precision)
