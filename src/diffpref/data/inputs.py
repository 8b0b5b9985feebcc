"""Where a dataset is read from: a local path, or a dataset id of the hub, whose shards are fetched one by one."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffpref import hub
from diffpref.data import parquet
from diffpref.data.resuming import UnreachableError
from diffpref.errors import UserError

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Input:
    """What is read. parts: each gives a local path when its turn comes; a local input has one part, itself.

    state: changes when the content does, as far as that can be told without reading it. revision: of a dataset id, the
    commit that is read.
    """

    name: str
    parts: tuple[Callable[[], Path], ...]
    state: str
    revision: str | None = None
    path: Path | None = None  # of a local input


def find_input(name: str, split: str, shards: tuple[str, ...], revision: str | None = None) -> Input:
    """A local file or folder, or else a dataset id `owner/name`, with a folder in it as `owner/name/folder`.

    shards: endings of files each of which its source can read alone, the preferred one first; the files are fetched
    when their turn comes. Of other sources everything is fetched before. Raises UserError where there is neither.
    """
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise UserError(f"--revision {revision}: {name} is a local path, which has no revisions")
        return Input(name, (lambda: path,), _state(path), path=path)
    named = HUB_ID.fullmatch(name)
    if not named:
        raise UserError(f"{name} does not exist")
    commit, files = _listing(named[1], revision, name)
    if named[2]:
        files = [file for file in files if file.startswith(f"{named[2].rstrip('/')}/")]
        if not files:
            raise UserError(f"dataset {named[1]} has no folder {named[2]!r}")
    if not shards:
        parts = (partial(_fetch_all, named[1], commit, named[2]),)
    else:
        parts = tuple(partial(_fetch, named[1], commit, file) for file in _of_split(name, files, split, shards))
    return Input(name, parts, commit, revision=commit)


def _state(path: Path) -> str:
    """A hash of the names, sizes and times of the files at a path."""
    digest = hashlib.sha256(os.fsencode(path.resolve()))
    for file in files_of(path):
        found = file.stat()
        told = repr((file.relative_to(path).parts, found.st_size, found.st_mtime_ns))
        digest.update(told.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def files_of(path: Path) -> Iterator[Path]:
    """The files at a path, in order, that tell whether it changed.

    Left out are pictures, of which there may be millions, and hidden folders: an output within the input grows in one.
    """
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.suffix.lower() not in PICTURES and not hidden and file.is_file():
            yield file


def _listing(dataset: str, revision: str | None, name: str) -> tuple[str, list[str]]:
    """The commit of a dataset id, and the names of its files. Raises UserError where it cannot be had."""
    import huggingface_hub
    from huggingface_hub import errors

    local = "a copy on this machine is read by its path in place of the id"
    try:
        info = hub.ask(dataset, lambda: huggingface_hub.HfApi().dataset_info(dataset, revision=revision))
    except errors.GatedRepoError:
        raise UserError(
            f"dataset {dataset} is gated: ask for access on its page and log in with `hf auth login`; or {local}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"dataset {dataset} has no revision {revision!r}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{name} is neither a path here nor a dataset on the hub (gone, renamed or private): {local}"
        ) from None
    except Exception as error:  # offline, no network, the hub's own faults: each of a kind of its own
        line = f"{name} is no path here, and the hub could not be asked for a dataset of this name"
        raise hub.refusal(f"{line} ({hub.explained(error)}): {local}", error, UnreachableError) from error
    return str(info.sha), sorted(file.rfilename for file in info.siblings or ())


def _of_split(name: str, files: list[str], split: str, shards: tuple[str, ...]) -> list[str]:
    """The files to import, chosen as those of a local folder are."""
    ending = next((each for each in shards if any(file.endswith(each) for file in files)), None)
    if ending is None:
        raise UserError(f"dataset {name} holds no {' or '.join(shards)} files")
    splits: dict[str, list[str]] = {}
    for file in files:
        if file.endswith(ending):
            splits.setdefault(parquet.split_of(Path(file)), []).append(file)
    if len(splits) > 1 and split not in splits:
        raise UserError(f"dataset {name} holds the splits {', '.join(sorted(splits))}: choose one of them with --split")
    chosen = splits[split] if split in splits else next(iter(splits.values()))
    folders = sorted({Path(file).parent.as_posix() for file in chosen})
    if len(folders) > 1:
        which = ", ".join(folders)
        raise UserError(f"dataset {name} has its split {split!r} in {which}: name one, as in {name}/{folders[0]}")
    return chosen


def _fetch(dataset: str, commit: str, file: str) -> Path:
    import huggingface_hub

    def fetch() -> str:
        return huggingface_hub.hf_hub_download(dataset, file, repo_type="dataset", revision=commit)

    try:
        return Path(hub.ask(f"{file} of dataset {dataset}", fetch))
    except Exception as error:
        raise _not_fetched(dataset, file, error) from error


def _fetch_all(dataset: str, commit: str, folder: str | None) -> Path:
    import huggingface_hub

    chosen = None if folder is None else [f"{folder.rstrip('/')}/*"]

    def fetch() -> str:
        return huggingface_hub.snapshot_download(dataset, repo_type="dataset", revision=commit, allow_patterns=chosen)

    try:
        found = hub.ask(f"dataset {dataset}", fetch)
    except Exception as error:
        raise _not_fetched(dataset, folder or "its files", error) from error
    return Path(found) / (folder or "")


def _not_fetched(dataset: str, what: str, error: Exception) -> Exception:
    line = f"{what} of dataset {dataset} could not be fetched ({hub.explained(error)})"
    return hub.refusal(f"{line}: the same command goes on from there", error, UnreachableError)
