"""A model of images and text as the judge of two folders: each pair is shown in both orders.

A judge may prefer whatever it sees first. So an image wins a pair only where it wins in both orders; where the orders
disagree the pair is a tie, and their share is reported as the position bias. A judge that always says "first" comes out
as 50% with a position bias of 100%.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from diffpref.captioners.base import Looker, NoCaption
from diffpref.data.engine.ledger import read_table, write_table
from diffpref.errors import RunError, UserError
from diffpref.evaluate.folders import GeneratedImage, open_image, read_folder
from diffpref.evaluate.statistics import bootstrap_mean, prompt_sign_test
from diffpref.files import sha256, write_whole
from diffpref.progress import Bar

log = logging.getLogger("diffpref")

Verdict = Literal["first", "second", "tie"]
SCHEMA = pa.schema({"question": pa.string(), "answer": pa.string()})


@dataclass(frozen=True)
class Words:
    """What a judge answers with; they are looked for as whole words, in any case."""

    first: str = "first"
    second: str = "second"
    tie: str = "tie"

    def read(self, answer: str) -> Verdict | None:
        """The verdict of an answer, None where it says none, or several and no last one after `answer` or `verdict`."""
        said = self._said(answer)
        if len(said) > 1:
            said = self._said(re.split(r"\b(?:answer|verdict)\b", answer, flags=re.IGNORECASE)[-1])
        return said.pop() if len(said) == 1 else None

    def _said(self, text: str) -> set[Verdict]:
        words: dict[Verdict, str] = {"first": self.first, "second": self.second, "tie": self.tie}
        return {
            verdict
            for verdict, word in words.items()
            if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags=re.IGNORECASE)
        }


@dataclass(frozen=True)
class Question:
    """Two images of a prompt in an order. key: a sum of all that the answer depends on besides the judge."""

    first: GeneratedImage
    second: GeneratedImage
    key: str


@dataclass(frozen=True)
class Judgement:
    """How b fares against a before a judge; intervals are 95%, with the prompt as the unit.

    position_bias: the share of pairs whose verdict changes with the order. first_chosen: the share of verdicts for
    either image that are for the one shown first, None without such. unread: pairs left out for an answer with no
    verdict. broken: pairs left out for an image that cannot be decoded. asked: questions that were new.
    """

    folder_a: Path
    folder_b: Path
    judge: dict[str, str | float]
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    wins: int
    losses: int
    ties: int
    position_bias: float
    position_bias_low: float
    position_bias_high: float
    first_chosen: float | None
    prompts: int
    pairs: int
    unread: int
    broken: int
    asked: int
    p_value: float

    def summary(self) -> dict[str, object]:
        """Ready for JSON."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


class Answers:
    """The answers of one judge, kept in a folder of parquet files, each of which appears whole."""

    def __init__(self, folder: Path, identity: Mapping[str, str | float]) -> None:
        told = json.dumps(identity, sort_keys=True, ensure_ascii=False, indent=2)
        self.folder = folder / f"judge-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
        write_whole(self.folder / "judge.json", f"{told}\n".encode())
        tables = [read_table(file) for file in sorted(self.folder.glob("[!.]*.parquet"))]
        rows = [row for table in tables if table and table.schema.equals(SCHEMA) for row in table.to_pylist()]
        self.known = {row["question"]: row["answer"] for row in rows}

    def keep(self, found: Mapping[str, str]) -> None:
        """Put new answers onto the disk."""
        if found:
            table = pa.table({"question": list(found), "answer": list(found.values())}, schema=SCHEMA)
            write_table(self.folder / f"{hashlib.sha256(min(found).encode()).hexdigest()[:16]}.parquet", table)
            self.known.update(found)


def judge_folders(
    folder_a: Path,
    folder_b: Path,
    load: Callable[[], Looker],
    identity: Mapping[str, str | float],
    words: Words,
    ledger: Path,
    seed: int = 0,
    batch: int = 32,
) -> Judgement:
    """Ask a judge of every pair in both orders what it was not asked before, and count.

    identity: what its answers depend on; answers are kept by it in the folder `ledger`. The judge is loaded only where
    there is something to ask. seed: of draws. Raises UserError where the folders do not pair, and RunError where no
    pair is left to count.
    """
    pairs = paired(folder_a, folder_b)
    sums = {image.file: sha256(image.file) for pair in pairs for image in pair}
    both = [(_question(a, b, sums), _question(b, a, sums)) for a, b in pairs]
    answers = Answers(ledger, identity)
    open_questions = {each.key: each for pair in both for each in pair if each.key not in answers.known}
    asked, broken = _ask(list(open_questions.values()), load, answers, seed, batch) if open_questions else (0, set())
    counted, verdicts, unread, lost = [], [], 0, 0
    for (a, _), orders in zip(pairs, both, strict=True):
        if any(each.key in broken for each in orders):
            lost += 1
            continue
        read = [words.read(answers.known.get(each.key, "")) for each in orders]
        if None in read:
            unread += 1
            continue
        counted.append(a.prompt)
        verdicts.append(read)
    if not verdicts:
        raise RunError(
            f"no verdict in {len(pairs)} pairs: {unread} without a readable answer, {lost} with an image broken"
        )
    return _judgement(folder_a, folder_b, dict(identity), counted, verdicts, unread, lost, asked)


def paired(folder_a: Path, folder_b: Path) -> list[tuple[GeneratedImage, GeneratedImage]]:
    """The images of both folders that are of the same prompt and place, in the order of the first folder.

    Raises UserError where one lacks what the other has, lists a place twice, or has another seed.
    """
    of_a, of_b = _by_place(folder_a), _by_place(folder_b)
    for has, lacks, keys in ((folder_a, folder_b, of_a.keys() - of_b.keys()), (folder_b, folder_a, of_b.keys() - of_a)):
        if keys:
            prompt, index = min(keys)
            raise UserError(
                f"the folders do not pair: {lacks} lacks image {index} of the prompt {prompt!r}, which {has} has "
                f"({len(keys)} such image{'s' * (len(keys) > 1)})"
            )
    for key, image in of_a.items():
        if image.seed != of_b[key].seed:
            raise UserError(
                f"the folders do not pair: image {key[1]} of the prompt {key[0]!r} has seed {image.seed} in {folder_a} "
                f"and {of_b[key].seed} in {folder_b}"
            )
    return [(image, of_b[key]) for key, image in of_a.items()]


def _by_place(folder: Path) -> dict[tuple[str, int], GeneratedImage]:
    found: dict[tuple[str, int], GeneratedImage] = {}
    for image in read_folder(folder):
        if found.setdefault((image.prompt, image.index), image) is not image:
            raise UserError(f"{image.where}: image {image.index} of the prompt {image.prompt!r} is listed twice")
    return found


def _question(first: GeneratedImage, second: GeneratedImage, sums: Mapping[Path, str]) -> Question:
    told = json.dumps([sums[first.file], sums[second.file], first.prompt])
    return Question(first, second, hashlib.sha256(told.encode()).hexdigest())


def _ask(
    questions: Sequence[Question], load: Callable[[], Looker], answers: Answers, seed: int, batch: int
) -> tuple[int, set[str]]:
    """Ask and keep the answers, a batch at a time. Gives how many were asked, and the keys with a broken image."""
    judge, asked, broken = load(), 0, set()
    told: set[Path] = set()
    with Bar("judging", len(questions), "questions") as bar:
        for start in range(0, len(questions), batch):
            shown, sound = [], []
            for each in questions[start : start + batch]:
                images = list(_opened(each, told))
                if len(images) == 2:
                    shown.append(images)
                    sound.append(each)
                else:
                    broken.add(each.key)
            draws = [int(hashlib.sha256(f"{seed} {each.key}".encode()).hexdigest()[:15], 16) for each in sound]
            given = judge.look(shown, [each.first.prompt for each in sound], draws) if sound else []
            found = {}
            for each, answer in zip(sound, given, strict=True):
                if isinstance(answer, NoCaption):
                    log.warning("%s: no answer: %s", each.first.where or each.first.file, answer.reason)
                else:
                    found[each.key] = answer
            answers.keep(found)
            asked += len(sound)
            bar.advance(min(batch, len(questions) - start))
    return asked, broken


def _opened(question: Question, told: set[Path]) -> Iterator[Image.Image]:
    """The images of a question that can be decoded; the others are named once."""
    for image in (question.first, question.second):
        try:
            yield open_image(image)
        except UserError as error:
            if image.file not in told:
                log.warning("left out: %s", error)
                told.add(image.file)


def _judgement(
    folder_a: Path,
    folder_b: Path,
    identity: dict[str, str | float],
    prompts: list[str],
    verdicts: list[list[Verdict | None]],
    unread: int,
    broken: int,
    asked: int,
) -> Judgement:
    """The counts of verdicts, of which the first of each pair is with a shown first, the second with b."""
    for_b = np.array([[_VALUE[first], 1 - _VALUE[second]] for first, second in verdicts])  # 1, 0, or a half for a tie
    agree = for_b[:, 0] == for_b[:, 1]
    values = np.where(agree, for_b[:, 0], 0.5)
    rate, bias = bootstrap_mean(values, prompts), bootstrap_mean(1.0 - agree, prompts)
    decided = [each for pair in verdicts for each in pair if each != "tie"]
    return Judgement(
        folder_a=folder_a,
        folder_b=folder_b,
        judge=identity,
        win_rate=rate.value,
        win_rate_low=rate.low,
        win_rate_high=rate.high,
        wins=int((values == 1).sum()),
        losses=int((values == 0).sum()),
        ties=int((values == 0.5).sum()),
        position_bias=bias.value,
        position_bias_low=bias.low,
        position_bias_high=bias.high,
        first_chosen=decided.count("first") / len(decided) if decided else None,
        prompts=len(set(prompts)),
        pairs=len(values),
        unread=unread,
        broken=broken,
        asked=asked,
        p_value=prompt_sign_test(np.full(len(values), 0.5), values, prompts),
    )


_VALUE: dict[Verdict | None, float] = {"first": 0.0, "second": 1.0, "tie": 0.5}  # for b, where a is shown first
