"""The embedded world's judge as a scorer: the share of a prompt that an image shows, and its cleanness, in [0, 1]."""

from dataclasses import dataclass

from PIL import Image

from diffpref.embedded.judge import judge
from diffpref.errors import UserError
from diffpref.scorers.base import Precision, Scorer, UnscorableError


@dataclass(frozen=True)
class EmbeddedJudge:
    """Scores by measuring pixels. Raise `version` whenever the judge's rules change its marks."""

    name: str = "embedded-judge"
    version: str = "1"

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        """One score in [0, 1] for each image; UnscorableError for a prompt without the embedded world's words."""
        scores = []
        for place, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            try:
                scores.append(judge(image, prompt))
            except ValueError as error:
                raise UnscorableError(str(error), place) from None
        return scores


def load(weights: str | None = None, device: str = "cpu", precision: Precision = "fp32") -> Scorer:
    """The judge; it is NumPy and runs on the CPU in full precision whatever is asked. Raises UserError for weights."""
    if weights:
        raise UserError(f"embedded-judge={weights}: the embedded judge has no weights")
    return EmbeddedJudge()
