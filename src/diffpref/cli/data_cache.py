"""`diffpref data cache DATASET --model MODEL`: build the latent store that `train` reads, ahead of training."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from diffpref.cli.parsing import parse
from diffpref.errors import UserError


@dataclass(frozen=True)
class Options:
    """Encode every image and prompt of a dataset once; what the store already holds is kept."""

    dataset: Annotated[str, tyro.conf.Positional]
    """A dataset in the normal form."""
    model: str
    """The pipeline folder or hub id whose VAE and text encoder are used, or `embedded`."""
    split: str = "train"
    resolution: int = 512
    buckets: bool = False
    """Store shapes near those of the images instead of squares, for training with data.buckets."""
    bucket_step: int = 64
    """Sides of buckets are multiples of so many pixels, as training's data.bucket_step."""
    bucket_max_aspect: float = 2.5
    """One side of a bucket is at most so many times the other, as training's data.bucket_max_aspect."""
    crop: Literal["center", "none"] = "center"
    flip: bool = False
    """Store the mirrored images too, for training with data.flip."""
    captions: Literal["prompt", "image"] = "prompt"
    """Store the rows' prompts, or each image's own caption, for training with data.captions."""
    cache: str | None = None
    """Folder of the store; beside the dataset (DATASET.cache) when not given."""
    vae: str | None = None
    """Another VAE: a folder, or a pipeline folder or hub id that holds one."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    max_text_length: int = 0
    """Tokens of the long text encoder, as training's model.max_text_length; 0 takes the family's own limit."""
    latents: Literal["mean", "moments"] = "mean"
    """Store the posterior's mean, or mean and variance, for training with data.latents moments."""
    verify: bool = False
    """Sum every shard of the store again, whatever its time says; what is damaged is made anew."""
    variant: Literal["base", "refiner"] = "base"
    """`refiner` for SDXL's refiner."""
    workers: int = 1
    """Processes that encode, on this machine, each on a GPU of its own; or torchrun -m diffpref data cache ..."""
    engine: Literal["local", "ray"] = "local"
    """`ray` encodes on a Ray cluster whose machines all see the dataset, the model and the store."""


def main(arguments: list[str]) -> None:
    """Build the store and print what it holds."""
    options = parse(Options, arguments, "diffpref data cache")
    if options.cache == "none":
        raise UserError("--cache: `none` is training without a store, so there is nothing to build; name a folder")

    from functools import partial

    from diffpref.cli.data_make import running_of
    from diffpref.data.engine import together

    if told := together(partial(_fill, options), running_of(options.workers, options.engine)):
        print(told)


def _fill(options: Options, main: bool) -> str:
    """Build the store, with others that are at it; what it holds."""
    from pathlib import Path

    import torch

    from diffpref.data.dataset import PreferenceDataset
    from diffpref.data.options import with_options
    from diffpref.data.store import build_store
    from diffpref.models.loading import best_device, load_backbone
    from diffpref.train.config import Config, DataConfig, ModelConfig
    from diffpref.train.preferences import store_path

    data = DataConfig(
        path=options.dataset,
        split=options.split,
        resolution=options.resolution,
        buckets=options.buckets,
        bucket_step=options.bucket_step,
        bucket_max_aspect=options.bucket_max_aspect,
        crop=options.crop,
        flip=options.flip,
        captions=options.captions,
        latents=options.latents,
        cache=options.cache,
    )
    dataset = with_options(PreferenceDataset.open(Path(options.dataset), options.split), data, "pairs")
    model = ModelConfig(
        options.model,
        vae=options.vae,
        variant=options.variant,
        revision=options.revision,
        max_text_length=options.max_text_length,
    )
    backbone = load_backbone(model, best_device(), torch.bfloat16, trainable=False)  # its U-Net is not run
    folder = store_path(Config(data=data))
    store = build_store(folder, dataset, backbone, data, shown=main, summed=options.verify)
    told = [f"skipped {dataset.ids[row]}: {reason}" for row, reason in store.bad.items()]
    texts = len(next(iter(store.text.values())))
    told.append(f"{sum(map(len, store.latents))} latents and {texts} prompts in {folder}, {store.nbytes:,} bytes")
    if options.buckets:
        rows = [row for row in range(len(dataset)) if row not in dataset.left_out and row not in store.bad]
        told.append(f"buckets: {store.buckets.told(store.buckets.counts(rows))}")
    return "\n".join(told)
