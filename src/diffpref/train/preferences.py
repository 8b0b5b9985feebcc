"""Open the preferences that a configuration names, with what they are read from: what the loop takes its batches of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffpref.data.annotate import select_top
from diffpref.data.captioning import caption_dataset
from diffpref.data.choice import Choice, choose_rows, with_weights
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.direct import Direct
from diffpref.data.labelling import label_dataset
from diffpref.data.loader import Loader
from diffpref.data.measuring import assign_buckets, refuse_sizes
from diffpref.data.options import with_options
from diffpref.data.scoring import scorers_named
from diffpref.data.store import build_store
from diffpref.data.views import Encoded
from diffpref.embedded.describer import Describer
from diffpref.errors import UserError
from diffpref.train.config import Config, DataConfig
from diffpref.types import Backbone, Items

EXPERTS_OF = {"embedded-experts": False, "embedded-expert-pairs": True}  # by data.path, whether whole pairs are kept
EMBEDDED = ("embedded", *EXPERTS_OF)  # values of data.path
DESCRIBER: dict[str, str | float] = {"captioner": Describer.name, "version": Describer.version}
EMBEDDED_JUDGE = "embedded-judge"
EXPERTS = 500  # images of `embedded-experts`, as many as Diffusion-DRO's published sets have


def items_of(config: Config) -> Items:
    """What the items of a run are: pairs if its points take them, else single images."""
    if config.points.takes_pairs:
        return "pairs"
    return "judged" if config.objective.needs_disliked else "liked"


def open_dataset(config: Config, accelerator: Any) -> PreferenceDataset:
    """The dataset as the configuration wants it read; all that can be refused without a model is refused here.

    The main process makes the embedded preferences; the others wait for it. Raises UserError.
    """
    items = items_of(config)
    if items == "pairs" and config.data.path == "embedded-experts":  # before thousands of images are scored
        raise _needs_pairs(config, config.data.path)
    if accelerator.is_main_process:
        make_embedded(config)
    accelerator.wait_for_everyone()
    dataset = PreferenceDataset.open(dataset_path(config), config.data.split)
    if items == "pairs" and dataset.kind != "pairs":
        raise _needs_pairs(config, dataset.path)
    dataset = with_options(dataset, config.data, items)
    if items == "judged" and dataset.kind == "images":
        _refuse_one_sided(config, dataset)
    with_weights(dataset, config.data, choose_rows(dataset, (), config.data))
    return dataset


def open_preferences(
    config: Config, backbone: Backbone, accelerator: Any, dataset: PreferenceDataset | None = None
) -> tuple[Loader, Loader | None, Choice]:
    """The loader of what is trained on, that of what is held out (None if nothing is), and the choice of rows.

    dataset: what `open_dataset` gave; it is called when not given. All processes fill the
    store together. Raises UserError for whatever is wrong with the data.
    """
    dataset = dataset or open_dataset(config, accelerator)
    encoded = _encoded(config, dataset, backbone, accelerator)
    choice = choose_rows(dataset, encoded.bad, config.data)
    weighted = with_weights(dataset, config.data, choice)

    def loader(rows: list[int], run: int) -> Loader:
        return Loader(weighted, encoded, backbone, config.data, rows, config.train.seed, items_of(config), run)

    step = config.train.batch_size * config.train.gradient_accumulation_steps * accelerator.num_processes
    return loader(choice.train, step), loader(choice.heldout, 1) if choice.heldout else None, choice


def _encoded(config: Config, dataset: PreferenceDataset, backbone: Backbone, accelerator: Any) -> Encoded:
    if config.data.cache == "none":
        refuse_sizes(backbone, config.data)
        beside = store_path(replace(config, data=replace(config.data, cache=None)))  # for the sizes of images alone
        buckets = assign_buckets(beside, dataset, config.data, shown=bool(accelerator.is_main_process))
        accelerator.wait_for_everyone()
        direct = Direct(dataset, backbone, config.data, buckets)
        if accelerator.is_main_process:
            direct.warn_of_cut_prompts()
        return direct
    main = bool(accelerator.is_main_process)
    store = build_store(store_path(config), dataset, backbone, config.data, shown=main)  # by all processes together
    backbone.release_encoders()  # training has their memory; validation loads them again
    accelerator.wait_for_everyone()
    return store


def _needs_pairs(config: Config, path: Path | str) -> UserError:
    return UserError(
        f"data.path: {path} holds single images, but the objective {config.objective.name!r} on "
        f"{config.points.name!r} points needs pairs (columns chosen and rejected)"
    )


def _refuse_one_sided(config: Config, dataset: PreferenceDataset) -> None:
    rows = [row for row in range(len(dataset)) if row not in dataset.left_out]
    liked, disliked = ((sign * (dataset.labels[rows] - 0.5) > 0).sum() for sign in (1, -1))
    if not liked or not disliked:
        raise UserError(
            f"data.path: the objective {config.objective.name!r} needs liked and disliked images, but {dataset.path} "
            f"has {liked} of a label above 0.5 and {disliked} of one below"
        )


def dataset_path(config: Config) -> Path:
    """Where the normal form lies; what is made of the embedded preferences is written into the run folder."""
    if config.data.path not in EMBEDDED:
        return Path(config.data.path)
    path = Path(config.output_dir) / "preferences"
    return path.with_name("-".join([path.name, *(name for name, _ in _embedded_steps(config.data))]))


def store_path(config: Config) -> Path:
    """Where the latent store lies: beside the dataset unless `data.cache` says otherwise."""
    if config.data.cache:
        return Path(config.data.cache)
    if config.data.path in EMBEDDED:  # one store, for all that is made of them shows the same images
        return Path(config.output_dir) / "preferences.cache"
    dataset = dataset_path(config)
    return dataset.with_name(f"{dataset.name}.cache")


def make_embedded(config: Config) -> None:
    """The embedded preferences with what the configuration asks of them, each step in a folder of its own."""
    if config.data.path not in EMBEDDED:
        return
    path = Path(config.output_dir) / "preferences"
    import_embedded(path)
    for name, make in _embedded_steps(config.data):
        before, path = path, path.with_name(f"{path.name}-{name}")
        if not (path / "dataset.json").is_file():
            make(PreferenceDataset.open(before), path)


def import_embedded(path: Path) -> None:
    """The embedded preference set in its normal form, made once."""
    from diffpref.data.importing import import_source
    from diffpref.embedded import PREFERENCES

    if not (path / "dataset.json").is_file():
        import_source("pickapic", PREFERENCES, path)


def _embedded_steps(data: DataConfig) -> list[tuple[str, Callable[[PreferenceDataset, Path], Any]]]:
    """What is made of the embedded preferences before training, by the name that it adds to their folder's."""
    steps: list[tuple[str, Callable[[PreferenceDataset, Path], Any]]] = []
    experts = data.path in EXPERTS_OF
    if experts or (data.choice_model or "").replace("_", "-") == EMBEDDED_JUDGE:
        scorers = scorers_named(EMBEDDED_JUDGE, "cpu")
        steps.append(("scored", lambda dataset, output: label_dataset(dataset, output, scorers)))
    if experts:
        pairs = EXPERTS_OF[data.path]
        select = partial(select_top, scorer=EMBEDDED_JUDGE, top=EXPERTS, pairs=pairs)
        steps.append(("expert-pairs" if pairs else "experts", select))
    if data.captions == "image":
        steps.append(("captioned", lambda dataset, output: caption_dataset(dataset, output, Describer, DESCRIBER)))
    return steps
