"""Pipeline folders on disk: found locally or fetched from the hub, looked at before anything heavy is loaded."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from diffpref import hub
from diffpref.errors import UserError, first_line, nearest

FETCHED = [
    "*.json",
    "*/*.json",
    "*/*.txt",
    "*/*.model",
    "*/diffusion_pytorch_model*.safetensors",
    "*/model*.safetensors",
    "diffusion_pytorch_model*.safetensors",  # a VAE or U-Net on its own
]
_WEIGHTLESS: ContextVar[bool] = ContextVar("weightless", default=False)
NOT_FETCHED = ["*.fp16.*", "*.fp16-*", "*.non_ema.*", "*.bf16.*", "safety_checker/*", "vae_1_0/*"]


def resolve(
    pretrained: str,
    revision: str | None = None,
    key: str = "model.pretrained",
    files: Sequence[str] = FETCHED,
) -> Path:
    """The local folder of a pipeline: `embedded`, a path, or a hub id, whose `files` are fetched into the hub's cache.

    Raises UserError with one line, naming the configuration's `key`, where there is neither; RunError where the hub
    fails again and again.
    """
    if pretrained == "embedded":
        from diffpref.embedded import MODEL

        return MODEL
    if Path(pretrained).is_dir():
        return Path(pretrained)
    if Path(pretrained).exists() or pretrained.startswith((".", "/", "~")) or pretrained.count("/") != 1:
        raise UserError(f"{key}: {pretrained} is no folder and no hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return snapshot_download(pretrained, revision=revision, allow_patterns=list(files), ignore_patterns=NOT_FETCHED)

    try:
        return Path(hub.ask(pretrained, fetch))
    except Exception as error:  # the hub's client raises many kinds: HTTP, offline, not found, bad id
        reason = hub.explained(error)
        line = f"{key}: {pretrained} is no folder here and could not be fetched: {reason}"
        raise hub.refusal(line, error) from error


def component(pipeline: Path, name: str) -> Path:
    """The subfolder of one part of a pipeline; raises UserError naming what the folder lacks."""
    if not (pipeline / "model_index.json").is_file():
        raise UserError(f"{pipeline} is no diffusers pipeline folder: it has no model_index.json")
    folder = pipeline / name
    if not folder.is_dir():
        there = sorted(path.name for path in pipeline.iterdir() if path.is_dir())
        raise UserError(f"{pipeline} has no {name}/ folder ({nearest(name, there)})")
    return folder


def override(place: str, name: str) -> Path:
    """A part given on its own: a folder with config.json, or a pipeline folder or hub id that holds it."""
    if (Path(place) / "config.json").is_file():
        return Path(place)
    found = resolve(place, key=f"model.{name}")
    return found if (found / "config.json").is_file() else component(found, name)


@contextmanager
def without_weights() -> Iterator[None]:
    """While it lasts, `load` reads config.json alone and builds parts on the meta device: shapes without content."""
    token = _WEIGHTLESS.set(True)
    try:
        yield
    finally:
        _WEIGHTLESS.reset(token)


def _shapes(kind: Any, path: Path, dtype: Any) -> Any:
    """The part that config.json describes, on the meta device, as `from_pretrained` gives it."""
    import torch

    config = read_json(path / "config.json")
    with torch.device("meta"), torch.random.fork_rng([]):
        of_transformers = hasattr(kind, "config_class")
        built = kind(kind.config_class.from_dict(config)) if of_transformers else kind.from_config(config)
        return torch.nn.Module.to(built, dtype).eval()  # diffusers' own `to` warns of what it cannot know


def load(kind: Any, path: Path, **options: Any) -> Any:
    """`kind.from_pretrained(path, ...)` of diffusers or transformers; raises UserError where it does not load."""
    from transformers.utils import logging

    if _WEIGHTLESS.get():
        try:
            return _shapes(kind, path, options.get("torch_dtype"))
        except UserError:
            raise
        except Exception as error:  # a wrong value fails wherever it is first used
            raise UserError(f"{path} does not load as a {kind.__name__}: {first_line(error)}") from error

    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():  # diffusers 0.42 calls the argument dtype, 0.38 torch_dtype
            warnings.simplefilter("ignore", FutureWarning)
            return kind.from_pretrained(path, **options)
    except Exception as error:  # each kind of part and of damage raises its own
        raise UserError(f"{path} does not load as a {kind.__name__}: {first_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def weights_hash(folder: Path) -> str:
    """SHA-256 over a part's config and weight files: what the results computed with it depend on."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".txt", ".bin"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
    return digest.hexdigest()


def copy_pipeline(source: Path, target: Path, without: set[str]) -> None:
    """Copy a pipeline's index and parts, but for those in `without`.

    A part that the source lacks (a safety checker, which is not fetched) is struck out of the index: diffusers would
    look for it.
    """
    index = read_json(source / "model_index.json")
    for name, entry in index.items():
        if isinstance(entry, list) and name not in without:
            if (source / name).is_dir():
                copy_part(source / name, target / name)
            else:
                index[name] = [None, None]
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    target.mkdir(parents=True, exist_ok=True)
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_part(source: Path, target: Path) -> None:
    """Copy one part's config and weights."""
    shutil.copytree(source, target, dirs_exist_ok=True)
