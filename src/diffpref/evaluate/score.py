"""Score the images of a folder, and keep the scores beside them in `scores/<scorer>.parquet`."""

import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.errors import UserError
from diffpref.evaluate.folders import GeneratedImage, open_image, read_folder
from diffpref.evaluate.statistics import standard_error
from diffpref.files import write_whole
from diffpref.progress import Bar
from diffpref.scorers.base import Scorer, UnscorableError

BATCH_SIZE = 64
SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),
        ("prompt", pa.string()),
        ("index", pa.int64()),
        ("seed", pa.int64()),
        ("score", pa.float64()),
        ("scorer", pa.string()),
        ("version", pa.string()),
    ]
)


@dataclass(frozen=True)
class Summary:
    """A folder's scores in short; the standard error takes prompts as the unit and is None for a single one."""

    folder: str
    scorer: str
    version: str
    mean: float
    standard_error: float | None
    images: int
    prompts: int
    file: str


@dataclass(frozen=True)
class Scores:
    """One score for each image of a folder, by one version of a scorer."""

    folder: Path
    scorer: str
    version: str
    images: tuple[GeneratedImage, ...]
    values: tuple[float, ...]

    @property
    def file(self) -> Path:
        """Where these scores are kept."""
        return scores_file(self.folder, self.scorer)

    def summary(self) -> Summary:
        """Mean, standard error by prompt, and counts."""
        values = np.array(self.values)
        prompts = [image.prompt for image in self.images]
        return Summary(
            folder=str(self.folder),
            scorer=self.scorer,
            version=self.version,
            mean=float(values.mean()),
            standard_error=standard_error(values, prompts),
            images=len(values),
            prompts=len(set(prompts)),
            file=str(self.file),
        )


def scores_file(folder: Path, scorer: str) -> Path:
    """Where a folder's scores by that scorer are kept."""
    return folder / "scores" / f"{scorer}.parquet"


def score_folder(folder: Path, scorer: Scorer, batch_size: int = BATCH_SIZE) -> Scores:
    """Score every image of a folder and write the scores beside them.

    Raises UserError for a folder or an image that is wrong, and for a prompt that the scorer cannot judge.
    """
    images = read_folder(folder)
    values: list[float] = []
    with Bar(f"scoring {folder.name} by {scorer.name}", len(images), "images") as bar:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            values += _score_batch(batch, scorer)
            bar.advance(len(batch))
    scores = Scores(folder, scorer.name, scorer.version, tuple(images), tuple(values))
    _write(scores)
    return scores


def scores_of(folder: Path, scorer: Scorer, batch_size: int = BATCH_SIZE) -> Scores:
    """A folder's scores as they were kept, or made now where they are missing or no longer those of its images."""
    kept = read_scores(folder, scorer)
    if kept is not None:
        return kept
    print(f"{folder} has no current scores by {scorer.name} {scorer.version}: scoring it now", file=sys.stderr)
    return score_folder(folder, scorer, batch_size)


def read_scores(folder: Path, scorer: Scorer) -> Scores | None:
    """The kept scores of a folder, or None where there are none by this version or its images have changed since."""
    images = read_folder(folder)
    file = scores_file(folder, scorer.name)
    try:
        written = file.stat().st_mtime_ns
        rows = pq.ParquetFile(file).read().to_pylist()
    except (OSError, pa.ArrowInvalid):
        return None
    listed = [(*_identity(image, folder), scorer.version) for image in images]
    kept = [tuple(row.get(key) for key in ("file_name", "prompt", "index", "seed", "version")) for row in rows]
    if kept != listed or any(image.file.stat().st_mtime_ns > written for image in images):
        return None
    return Scores(folder, scorer.name, scorer.version, tuple(images), tuple(row["score"] for row in rows))


def _score_batch(batch: list[GeneratedImage], scorer: Scorer) -> list[float]:
    try:
        values = scorer([open_image(image) for image in batch], [image.prompt for image in batch])
    except UnscorableError as error:
        raise UserError(f"{batch[error.place].file}: {error}") from None
    for image, value in zip(batch, values, strict=True):
        if not math.isfinite(value):
            raise RuntimeError(f"{scorer.name} gave {image.file} the score {value}")
    return values


def _write(scores: Scores) -> None:
    rows = [
        dict(zip(SCHEMA.names, (*_identity(image, scores.folder), value, scores.scorer, scores.version), strict=True))
        for image, value in zip(scores.images, scores.values, strict=True)
    ]
    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), written)
    write_whole(scores.file, written.getvalue())


def _identity(image: GeneratedImage, folder: Path) -> tuple[str, str, int, int | None]:
    return image.file.relative_to(folder).as_posix(), image.prompt, image.index, image.seed
