"""What a scorer is, and how one is found by its name."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from PIL import Image

from diffpref import scorers
from diffpref.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

Precision = Literal["fp32", "fp16", "bf16"]


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


@runtime_checkable
class Prepare(Protocol):
    """Turns an RGB image into a network's input. Equal ones do the same, so scorers of one pass share their work."""

    def __call__(self, image: Image.Image) -> Tensor: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Reward:
    """A reward model as a scorer: what it does to a single image apart from what its network says of a batch.

    identity: all that its scores depend on (weights and their SHA-256, preprocessing, resize, precision ...).
    measure: scores (n,) fp32 of n prepared images and their prompts.
    """

    name: str
    identity: dict[str, str]
    prepare: Prepare
    measure: Callable[[Sequence[Tensor], Sequence[str]], Tensor]

    @property
    def version(self) -> str:
        """Twelve digits that change with the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        """One score for each image and its prompt."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts")
        return self.measure([self.prepare(image) for image in images], prompts).tolist() if images else []


def identity_of(scorer: Scorer) -> dict[str, str]:
    """What is written beside a scorer's scores: its name, its version, and what that version stands for."""
    own = getattr(scorer, "identity", {})
    return {"scorer": scorer.name, "version": scorer.version, **own}


class UnscorableError(UserError):
    """An image that a scorer cannot score; `place` is where it stands in the batch."""

    def __init__(self, message: str, place: int) -> None:
        super().__init__(message)
        self.place = place


def scorer_names() -> list[str]:
    """The names that `load_scorer` knows: those of the modules, with `-` for `_`, and `.` for one before a digit."""
    modules = (module.name for module in pkgutil.iter_modules(scorers.__path__) if not module.ispkg)
    return sorted(re.sub(r"_(?=\d)", ".", name).replace("_", "-") for name in modules if name != "base")


def load_scorer(wanted: str, device: str = "cpu", precision: Precision | None = None) -> Scorer:
    """Load a scorer by its name, as `NAME=WEIGHTS` from weights of one's own, or from a file of one's own.

    WEIGHTS is a hub id, a folder or a file; some scorers take a second such place after another `=`. A Python file is
    the user's own code and has a function `score(images, prompts)` or `load(device)`; a safetensors file is a linear
    head on CLIP's image features, and `HEAD.safetensors=CLIP` takes another CLIP than its metadata tell.
    precision: of the network's weights, None for the scorer's own (fp32, but bf16 for HPSv3); scores are always fp32.
    Raises UserError with the nearest right name for an unknown one, for weights that cannot be read or are not this
    scorer's, and for a file that gives no scorer.
    """
    if wanted.endswith(".py"):
        return _from_file(Path(wanted), device)
    name, _, weights = wanted.partition("=")
    if precision not in (None, *get_args(Precision)):
        raise UserError(f"precision: {precision!r} is none of {', '.join(get_args(Precision))}")
    if name.endswith(".safetensors"):
        heads = importlib.import_module(f"{scorers.__name__}.parts.heads")
        return heads.load_head(Path(name), _own_name(Path(name)), weights or None, device, precision or "fp32")
    if name not in scorer_names():
        raise UserError(f"unknown scorer {name!r}: {nearest(name, scorer_names())}")
    module = importlib.import_module(f"{scorers.__name__}.{re.sub('[-.]', '_', name)}")
    return module.load(weights or None, device, *((precision,) if precision else ()))


@dataclass(frozen=True)
class _OfFile:
    """A scorer of a file. Its version changes with the file, so that no score of former code is taken for its own."""

    scorer: Scorer
    name: str
    version: str

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return self.scorer(images, prompts)


@dataclass(frozen=True)
class _OfFunction:
    """A scorer that is a function of a file and is called as the file is; its version is the file's."""

    function: Callable[..., Any]  # of images and prompts, to one number for each
    file: Path
    name: str
    version: str

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        scores = [float(score) for score in self.function(images, prompts)]
        if len(scores) != len(images):
            raise UserError(f"the scorer {self.file}: score gives {len(scores)} numbers for {len(images)} images")
        return scores


def _own_name(file: Path) -> str:
    """What a scorer of a file is called: as the file, which must not be called as one of ours is."""
    if file.stem in scorer_names():
        raise UserError(f"the scorer {file} would be called {file.stem}, as one of diffpref's is: rename the file")
    return file.stem


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
    function = getattr(module, "score", None)
    if callable(function) and not hasattr(module, "load"):
        return _OfFunction(function, file, _own_name(file), hashlib.sha256(content).hexdigest()[:12])
    if not callable(getattr(module, "load", None)):
        raise UserError(f"the scorer {file} has no function load(device), and none score(images, prompts)")
    scorer = module.load(device)
    if not isinstance(scorer, Scorer):
        raise UserError(f"the scorer {file}: load gives {type(scorer).__name__}, which has no name, version or call")
    return _OfFile(scorer, scorer.name, f"{scorer.version}-{hashlib.sha256(content).hexdigest()[:8]}")
