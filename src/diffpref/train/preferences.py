"""Open the preferences that a configuration names, with their store: what the loop reads from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffpref.data.dataset import PairDataset
from diffpref.data.loader import Choice, Loader, choose_rows
from diffpref.data.store import build_store
from diffpref.train.config import Config
from diffpref.types import Backbone


def open_preferences(config: Config, backbone: Backbone, accelerator: Any) -> tuple[Loader, Loader | None, Choice]:
    """The loader of the training pairs, that of the held-out ones (None if there are none), and the choice of rows.

    The main process imports the embedded preferences and fills the store; the others wait for it.
    Raises UserError for whatever is wrong with the data.
    """
    path = dataset_path(config)
    if accelerator.is_main_process and config.data.path == "embedded":
        import_embedded(path)
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    dataset = PairDataset.open(path, config.data.split)
    store = build_store(store_path(config), dataset, backbone, config.data)
    if accelerator.is_main_process:
        accelerator.wait_for_everyone()
    choice = choose_rows(dataset, store, config.data)
    pairs = config.objective.needs_pairs

    def loader(rows: list[int]) -> Loader:
        return Loader(dataset, store, backbone, config.data, rows, config.train.seed, pairs)

    return loader(choice.train), loader(choice.heldout) if choice.heldout else None, choice


def dataset_path(config: Config) -> Path:
    """Where the normal form lies; the embedded preferences are imported into the run folder."""
    return Path(config.output_dir) / "preferences" if config.data.path == "embedded" else Path(config.data.path)


def store_path(config: Config) -> Path:
    """Where the latent store lies: beside the dataset unless `data.cache` says otherwise."""
    dataset = dataset_path(config)
    return Path(config.data.cache) if config.data.cache else dataset.with_name(f"{dataset.name}.cache")


def import_embedded(path: Path) -> None:
    """The embedded preference set in its normal form, made once."""
    from diffpref.data.importing import import_source
    from diffpref.embedded import PREFERENCES

    if not (path / "dataset.json").is_file():
        import_source("pickapic", PREFERENCES, path)
