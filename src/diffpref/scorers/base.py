"""What a scorer is, and how one is found by its name."""

import hashlib
import importlib
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
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
    """Load the scorer of the module `name`, in which `-` stands for `_`, or of a Python file, if `name` ends in .py.

    Such a file is the user's own code; like a module here, it has a function `load(device)`. Raises UserError with the
    nearest right name for an unknown one, and for a file that gives no scorer.
    """
    if name.endswith(".py"):
        return _from_file(Path(name), device)
    if name not in scorer_names():
        raise UserError(f"unknown scorer {name!r}: {nearest(name, scorer_names())}")
    module = importlib.import_module(f"{scorers.__name__}.{name.replace('-', '_')}")
    return module.load(device)


@dataclass(frozen=True)
class _OfFile:
    """A scorer of a file. Its version changes with the file, so that no score of former code is taken for its own."""

    scorer: Scorer
    name: str
    version: str

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return self.scorer(images, prompts)


def _from_file(file: Path, device: str) -> Scorer:
    try:
        content = file.read_bytes()
        module = ModuleType(f"{scorers.__name__}.of_file.{file.stem}")
        sys.modules[module.__name__] = module  # where dataclasses look for theirs
        exec(compile(content, str(file), "exec"), module.__dict__)
    except OSError as error:
        raise UserError(f"cannot read the scorer {file}: {error.strerror}") from error
    except Exception as error:
        raise UserError(f"the scorer {file} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "load", None)):
        raise UserError(f"the scorer {file} has no function load(device)")
    scorer = module.load(device)
    if not isinstance(scorer, Scorer):
        raise UserError(f"the scorer {file}: load gives {type(scorer).__name__}, which has no name, version or call")
    return _OfFile(scorer, scorer.name, f"{scorer.version}-{hashlib.sha256(content).hexdigest()[:8]}")
