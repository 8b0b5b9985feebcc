"""Make a synthetic Pick-a-Pic v2 in its exact schema: so many rows of small JPEG pictures, in several shards.

    python benchmarks/make_pickapic.py OUTPUT [--rows 50000] [--shards 10] [--side 64] [--seed 0]

One row in ten is a tie; prompts and images come several times, as they do in the original; models and annotators are
few. A row depends on the seed and its number alone.
"""

import argparse
import datetime
import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
    ]
)
MODELS = ("dreamlike-photoreal-2.0", "stable-diffusion-2-1", "stable-diffusion-xl-alpha", "openjourney")
WORDS = ("red", "blue", "large", "small", "circle", "cross", "castle", "river", "portrait", "photo", "oil", "night")
PROMPT_ROWS = 14  # rows that share a prompt
START = datetime.datetime(2023, 1, 1)


def picture(seed: int, number: int, side: int) -> bytes:
    """A JPEG of a few soft stripes, different for every number."""
    rng = np.random.default_rng((seed, number))
    rows, columns = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(6.28 * (a * rows + b * columns + c)) for a, b, c in rng.uniform(0.5, 4, (3, 3))]
    pixels = np.stack(waves, axis=-1) * 100 + 128 + rng.normal(0, 6, (side, side, 3))
    written = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(written, "JPEG", quality=90)
    return written.getvalue()


def row(seed: int, number: int, side: int) -> dict[str, object]:
    """Row `number`: consecutive rows of a prompt share an image, as when an annotator goes on with the winner."""
    rng = np.random.default_rng((seed, 1, number))
    prompt = np.random.default_rng((seed, 2, number // PROMPT_ROWS))
    label = float(rng.choice([0.0, 0.5, 1.0], p=[0.45, 0.1, 0.45]))
    uids = [f"uid-{seed}-{number}", f"uid-{seed}-{number + 1}"]
    return {
        "are_different": True,
        "best_image_uid": "tie" if label == 0.5 else uids[0 if label else 1],
        "caption": f"{' '.join(prompt.choice(WORDS, 6))}, number {number // PROMPT_ROWS}",
        "created_at": START + datetime.timedelta(seconds=number),
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": f"https://images.invalid/{uids[0]}.png",
        "image_1_uid": uids[1],
        "image_1_url": f"https://images.invalid/{uids[1]}.png",
        "jpg_0": picture(seed, number, side),
        "jpg_1": picture(seed, number + 1, side),
        "label_0": label,
        "label_1": 1 - label,
        "model_0": str(rng.choice(MODELS)),
        "model_1": str(rng.choice(MODELS)),
        "ranking_id": number,
        "user_id": int(rng.integers(500)),
        "num_example_per_prompt": PROMPT_ROWS,
    }


def make(output: Path, rows: int, shards: int, side: int, seed: int, group_rows: int = 1000) -> None:
    """Write `train-00000-of-000NN.parquet`, ... with row groups of `group_rows` rows."""
    output.mkdir(parents=True, exist_ok=True)
    ends = np.linspace(0, rows, shards + 1).astype(int)
    for shard, (first, end) in enumerate(pairwise(ends)):
        file = output / f"train-{shard:05d}-of-{shards:05d}.parquet"
        with pq.ParquetWriter(file, SCHEMA) as writer:
            for start in range(first, end, group_rows):
                group = [row(seed, number, side) for number in range(start, min(start + group_rows, end))]
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
        print(f"{file}: {end - first} rows, {file.stat().st_size / 2**20:.1f} MB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    for name, default in (("rows", 50_000), ("shards", 10), ("side", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    make(given.output, given.rows, given.shards, given.side, given.seed)
