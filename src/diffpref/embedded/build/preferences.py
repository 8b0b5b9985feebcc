"""Make the embedded preference set and the held-out prompts: the base model's own samples, judged, then disturbed.

Each pair is two seeds of one prompt. The judge's nearest tenth are called ties, and a tenth of the others are labelled
the wrong way round, as people's labels are noisy too. The schema is Pick-a-Pic's.
"""

import io
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffpref.draws import draw_seed
from diffpref.embedded import world
from diffpref.embedded.judge import judge
from diffpref.evaluate.generate import to_images
from diffpref.progress import Bar
from diffpref.sampling import Sampling, sample, scheduler_of
from diffpref.types import Backbone

HELDOUT_COMPOSITIONS = 108
HELDOUT_TEMPLATES = (0, 1)
TIE_SHARE, FLIPPED_SHARE = 0.1, 0.1
BATCH = 32
MODEL_NAME = "diffpref/embedded"


def split_compositions(seed: int) -> tuple[list[world.Composition], list[world.Composition]]:
    """The compositions that pairs are made of, and those held out."""
    everything = world.compositions()
    order = np.random.default_rng(seed).permutation(len(everything))
    heldout = sorted(order[:HELDOUT_COMPOSITIONS])
    return [everything[i] for i in sorted(order[HELDOUT_COMPOSITIONS:])], [everything[i] for i in heldout]


def write_heldout_prompts(file: Path, seed: int) -> None:
    """One prompt a line, two for each held-out composition."""
    _, heldout = split_compositions(seed)
    file.write_text("".join(c.caption(t) + "\n" for c in heldout for t in HELDOUT_TEMPLATES), encoding="utf-8")


def write_preferences(backbone: Backbone, folder: Path, seed: int, pairs: int, how: Sampling) -> None:
    """Sample, judge and write `folder/train.parquet` in the Pick-a-Pic schema, the images as JPEG bytes."""
    rng = np.random.default_rng(draw_seed(seed, "preferences"))
    shown, _ = split_compositions(seed)
    order = np.concatenate([rng.permutation(len(shown)) for _ in range(-(-pairs // len(shown)))])[:pairs]
    captions = [shown[i].caption(int(rng.integers(len(world.TEMPLATES)))) for i in order]
    scheduler = scheduler_of(how.sampler, backbone.scheduler_config)
    images: list[list[Image.Image]] = []
    with Bar("preference pairs", pairs, "pairs") as bar:
        for start in range(0, pairs, BATCH):
            group = captions[start : start + BATCH]
            both = []
            for side in range(2):
                seeds = [draw_seed(seed, "pair", start + i, side) % 2**32 for i in range(len(group))]
                latents = sample(backbone, scheduler, group, seeds, world.SIDE, how)
                both.append(to_images(backbone.decode(latents)))
            images += [list(pair) for pair in zip(*both, strict=True)]
            bar.advance(len(group))
    gains = np.array([judge(a, text) - judge(b, text) for (a, b), text in zip(images, captions, strict=True)])
    folder.mkdir(parents=True, exist_ok=True)
    table = _table(captions, images, _labels(gains, rng), rng)
    pq.write_table(table, folder / "train.parquet", row_group_size=256)


def _labels(gains: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """label_0 for the judge's gains of image 0 over image 1: 1, 0, or 0.5 for a tie."""
    labels = (gains > 0).astype(np.float64)
    flipped = rng.random(len(gains)) < FLIPPED_SHARE
    labels[flipped] = 1 - labels[flipped]
    labels[np.argsort(abs(gains), kind="stable")[: round(TIE_SHARE * len(gains))]] = 0.5
    return labels


def _table(
    captions: list[str], images: list[list[Image.Image]], labels: np.ndarray, rng: np.random.Generator
) -> pa.Table:
    count = len(captions)
    uids = [[f"embedded-{row:05d}-{side}" for row in range(count)] for side in range(2)]
    best = [uids[0][row] if label == 1 else uids[1][row] if label == 0 else "tie" for row, label in enumerate(labels)]
    times = [datetime(2026, 1, 1) + timedelta(seconds=60 * row) for row in range(count)]
    columns = {
        "are_different": pa.array([True] * count),
        "best_image_uid": pa.array(best),
        "caption": pa.array(captions),
        "created_at": pa.array(times, pa.timestamp("ns")),
        "has_label": pa.array([True] * count),
        "image_0_uid": pa.array(uids[0]),
        "image_0_url": pa.array([""] * count),
        "image_1_uid": pa.array(uids[1]),
        "image_1_url": pa.array([""] * count),
        "jpg_0": pa.array([_jpeg(pair[0]) for pair in images], pa.binary()),
        "jpg_1": pa.array([_jpeg(pair[1]) for pair in images], pa.binary()),
        "label_0": pa.array(labels),
        "label_1": pa.array(1 - labels),
        "model_0": pa.array([MODEL_NAME] * count),
        "model_1": pa.array([MODEL_NAME] * count),
        "num_example_per_prompt": pa.array([captions.count(text) for text in captions], pa.int64()),
        "ranking_id": pa.array(range(count), pa.int64()),
        "user_id": pa.array(rng.integers(0, 20, count), pa.int64()),
    }
    return pa.table(columns)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
