"""The embedded world's judge as a scorer: the share of a prompt that an image shows, and its cleanness, in [0, 1]."""

from dataclasses import dataclass

from PIL import Image

from diffpref.embedded.judge import judge
from diffpref.scorers.base import Scorer, UnscorableError


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


def load(device: str = "cpu") -> Scorer:
    """The judge; it is NumPy and runs on the CPU whatever the device."""
    return EmbeddedJudge()
