"""What a scorer is, and how one is found by its name."""

import importlib
import pkgutil
from typing import Protocol, runtime_checkable

from PIL import Image

from diffpref import scorers
from diffpref.errors import UserError, nearest


@runtime_checkable
class Scorer(Protocol):
    """Says how well images show their prompts; higher is better. Scores are comparable only within one version."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        """One score for each image and its prompt.

        Raises UnscorableError for the first image that cannot be scored.
        """
        ...


class UnscorableError(UserError):
    """An image that a scorer cannot score; `place` is where it stands in the batch."""

    def __init__(self, message: str, place: int) -> None:
        super().__init__(message)
        self.place = place


def scorer_names() -> list[str]:
    """The names that `load_scorer` knows."""
    modules = (module.name for module in pkgutil.iter_modules(scorers.__path__))
    return sorted(name.replace("_", "-") for name in modules if name != "base")


def load_scorer(name: str, device: str = "cpu") -> Scorer:
    """Load the scorer of the module `name`, in which `-` stands for `_`.

    Raises UserError with the nearest right name for an unknown one.
    """
    if name not in scorer_names():
        raise UserError(f"unknown scorer {name!r}: {nearest(name, scorer_names())}")
    module = importlib.import_module(f"{scorers.__name__}.{name.replace('-', '_')}")
    return module.load(device)
