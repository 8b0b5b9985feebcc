"""Score images, and keep the scores beside them in `scores/<scorer>.parquet`.

Every scorer sees an image in one pass, and the ledger holds what was said of it: nothing is scored twice, whatever cut
a run short.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.data.engine import Answer, Answers, Running
from diffpref.data.scoring import LoadScorer, loaded_once, score_all
from diffpref.errors import UserError
from diffpref.evaluate.combining import Combination, combine
from diffpref.evaluate.folders import GeneratedImage
from diffpref.evaluate.statistics import standard_error
from diffpref.evaluate.targets import Target, folder_target
from diffpref.files import write_whole
from diffpref.scorers.base import Scorer, identity_of

BATCH_SIZE = 64
NAMED = 10  # images without a score that are named on stderr
IDENTITY = b"diffpref.scorer"  # the key of a file's metadata under which the scorer's identity stands as JSON
TYPES = {"index": pa.int64(), "seed": pa.int64(), "score": pa.float64()}  # of columns that hold no text


@dataclass(frozen=True)
class Summary:
    """Scores of a folder, or of one side of a dataset, in short.

    standard_error: with the prompt as the unit; None for a single one. missing: images without a score.
    """

    folder: str
    side: str
    scorer: str
    version: str
    mean: float | None
    standard_error: float | None
    images: int
    prompts: int
    missing: int
    file: str


@dataclass(frozen=True)
class Scores:
    """One score for each image of a target, by one version of a scorer; NaN where an image has none.

    kept: whether they stand in a file.
    """

    target: Target
    scorer: str
    version: str
    values: tuple[float, ...]
    kept: bool = True

    @property
    def folder(self) -> Path:
        """What was scored."""
        return self.target.path

    @property
    def images(self) -> tuple[GeneratedImage, ...]:
        """The records of a folder's images."""
        return self.target.images

    @property
    def file(self) -> Path:
        """Where these scores are kept."""
        return scores_file(self.target, self.scorer)

    def summary(self) -> Summary:
        """Mean, standard error by prompt, and counts, of the first side."""
        return self.summaries()[0]

    def summaries(self) -> list[Summary]:
        """A summary for each side."""
        return [self._summary(side) for side in self.target.pictures.sides]

    def _summary(self, side: str) -> Summary:
        values = np.array(self.values)[self.target.of_side(side)]
        known = np.isfinite(values)
        prompts = [prompt for prompt, there in zip(self.target.prompts, known, strict=True) if there]
        return Summary(
            folder=str(self.target.path),
            side="" if self.target.is_folder else side,
            scorer=self.scorer,
            version=self.version,
            mean=float(values[known].mean()) if prompts else None,
            standard_error=standard_error(values[known], prompts) if prompts else None,
            images=int(known.sum()),
            prompts=len(set(prompts)),
            missing=int((~known).sum()),
            file=str(self.file) if self.kept else "",
        )


def scores_file(target: Target, scorer: str) -> Path:
    """Where a target's scores by that scorer are kept."""
    return target.folder / f"{scorer}.parquet"


def score(
    targets: Sequence[Target],
    scorers: Sequence[LoadScorer],
    batch_size: int = BATCH_SIZE,
    running: Running | None = None,
    overwrite: bool = False,
) -> list[Scores]:
    """Score the targets by all scorers, each image in one pass, and write the scores: target by target. [] on ranks
    above 0.

    An image that cannot be decoded, or that a scorer cannot score, is named and has no score. Raises UserError where a
    file of scores is of another version of its scorer and not to be overwritten, and where a scorer can score nothing.
    """
    once = loaded_once(scorers)
    if not overwrite:
        for target in targets:
            for load in once:
                _refuse_other(target, load())
    found = []
    for target in targets:
        share = 1.0 if target.is_folder else (running or Running()).bad_share
        how = replace(running or Running(), bad_share=share)
        answers = score_all(target, once, target.ledger, how, batch_size)
        if answers is None:
            continue
        _name_missing(target, [load().name for load in once], answers)
        for load, said in zip(once, answers, strict=True):
            found.append(_write(target, load(), [said[place] for place in range(len(said))]))
    return found


def combined(found: Sequence[Scores], combination: Combination) -> list[Scores]:
    """A combination's scores, target by target, of what `score` gave: all images of all targets count together.

    They are kept in no file, for they depend on what is combined together.
    """
    targets = list({id(each.target): each.target for each in found}.values())
    by = {name: [each for each in found if each.scorer == name] for name in dict.fromkeys(e.scorer for e in found)}
    values = {name: np.concatenate([each.values for each in of]) for name, of in by.items()}
    prompts = [prompt for target in targets for prompt in target.prompts for _ in target.pictures.sides]
    total, first = combine(combination, values, prompts), 0
    version, made = "+".join(of[0].version for of in by.values()), []
    for target in targets:
        own = total[first : first + len(target.prompts) * len(target.pictures.sides)]
        made.append(Scores(target, combination.name, version, tuple(own.tolist()), kept=False))
        first += len(own)
    return made


def scores_of(folder: Path, scorer: Scorer, batch_size: int = BATCH_SIZE) -> Scores:
    """A folder's scores by one scorer, as `all_scores_of`."""
    return all_scores_of(folder, [scorer], batch_size)[0]


def all_scores_of(folder: Path, scorers: Sequence[Scorer], batch_size: int = BATCH_SIZE) -> list[Scores]:
    """A folder's scores by each scorer as they are kept; those that are missing or old are made now, in one pass.

    Raises UserError as `score`, and where an image has no score.
    """
    target = folder_target(folder)
    kept = {scorer.name: read_scores(target, scorer) for scorer in scorers}
    new = [scorer for scorer in scorers if kept[scorer.name] is None]
    for scorer in new:
        print(f"{folder} has no current scores by {scorer.name} {scorer.version}: scoring it now", file=sys.stderr)
    for scores in score([target], [lambda scorer=scorer: scorer for scorer in new], batch_size) if new else []:
        kept[scores.scorer] = scores
    found = [scores for scorer in scorers if (scores := kept[scorer.name]) is not None]
    for scores in found:
        missing = [image.file for image, value in zip(scores.images, scores.values, strict=True) if math.isnan(value)]
        if missing:
            raise UserError(f"{len(missing)} images of {folder} have no score by {scores.scorer}; such as {missing[0]}")
    return found


def read_scores(target: Target, scorer: Scorer) -> Scores | None:
    """The kept scores of a folder, or None where there are none by this version or its images have changed since."""
    file = scores_file(target, scorer.name)
    try:
        written = file.stat().st_mtime_ns
        table = pq.ParquetFile(file).read()
    except (OSError, pa.ArrowInvalid):
        return None
    same = _identity_in(table.schema) == identity_of(scorer) and {"score", *target.columns} <= set(table.column_names)
    if not same or any(table[name].to_pylist() != values for name, values in target.columns.items()):
        return None
    if any(image.file.stat().st_mtime_ns > written for image in target.images):
        return None
    return _scores(target, scorer, table["score"].to_pylist())


def _scores(target: Target, scorer: Scorer, values: list[float | None]) -> Scores:
    return Scores(target, scorer.name, scorer.version, tuple(math.nan if v is None else v for v in values))


def _write(target: Target, scorer: Scorer, said: list[Answer]) -> Scores:
    values = [answer.value if isinstance(answer.value, float) else None for answer in said]
    columns = {
        **target.columns,
        "score": values,
        "why": [answer.why for answer in said],
        "scorer": [scorer.name] * len(said),
        "version": [scorer.version] * len(said),
    }
    schema = pa.schema([(name, TYPES.get(name, pa.string())) for name in columns])
    identity = json.dumps(identity_of(scorer), sort_keys=True)
    written = io.BytesIO()
    pq.write_table(pa.table(columns, schema.with_metadata({IDENTITY: identity})), written)
    write_whole(scores_file(target, scorer.name), written.getvalue())
    return _scores(target, scorer, values)


def _refuse_other(target: Target, scorer: Scorer) -> None:
    """Raise UserError where a file holds scores of another version, with both identities."""
    file, wanted = scores_file(target, scorer.name), identity_of(scorer)
    try:
        held = _identity_in(pq.read_schema(file))
    except (OSError, pa.ArrowInvalid):
        return
    if held is not None and held != wanted:
        of_held, of_wanted = (_different(one, other) for one, other in ((held, wanted), (wanted, held)))
        raise UserError(f"{file} holds scores of {of_held}, not of {of_wanted}; --overwrite replaces them")


def _identity_in(schema: pa.Schema) -> dict[str, str] | None:
    try:
        return json.loads((schema.metadata or {})[IDENTITY])
    except (KeyError, ValueError):
        return None


def _different(identity: dict[str, str], other: dict[str, str]) -> str:
    """An identity in words: its name, its version, and what else the other one lacks."""
    more = [f"{key} {value}" for key, value in identity.items() if other.get(key) != value and key != "version"]
    return ", ".join([f"{identity.get('scorer')} {identity.get('version')}", *more])


def _name_missing(target: Target, names: list[str], answers: list[Answers]) -> None:
    """Name the first images without a score, and count them: broken ones once, others for each scorer."""
    sides = target.pictures.sides
    lines: dict[str, None] = {}
    for name, said in zip(names, answers, strict=True):
        for place in range(len(said)):
            answer = said[place]
            if answer.value is None:
                where = target.pictures.where(place // len(sides), sides[place % len(sides)])
                why = f"cannot be decoded: {answer.why}" if answer.broken else f"no score by {name}"
                lines[f"{where}: {why}" + (f": {answer.why}" if answer.why and not answer.broken else "")] = None
    for line in list(lines)[:NAMED]:
        print(f"diffpref: warning: {line}", file=sys.stderr)
    if len(lines) > NAMED:
        print(f"diffpref: warning: and {len(lines) - NAMED} more without a score", file=sys.stderr)
