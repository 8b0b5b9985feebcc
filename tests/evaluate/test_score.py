"""Scores are kept beside the images, whole, and only as long as they are those of the images."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.generated import Brightness, make_folder, read_rows, write_rows

from diffpref.errors import UserError
from diffpref.evaluate.score import SCHEMA, read_scores, score_folder, scores_of
from diffpref.evaluate.statistics import standard_error
from diffpref.scorers.base import load_scorer


def test_scores_are_written_in_the_folders_order(tmp_path: Path):
    folder = make_folder(tmp_path / "images", prompts=5, per_prompt=2)
    scorer = Brightness()
    scores = score_folder(folder, scorer, batch_size=4)
    assert scorer.batches == [4, 4, 2]
    table = pq.read_table(folder / "scores" / "brightness.parquet")
    assert table.schema == SCHEMA
    rows = table.to_pylist()
    assert [{key: row[key] for key in ("file_name", "prompt", "index", "seed")} for row in rows] == read_rows(folder)
    first = np.asarray(Image.open(folder / rows[0]["file_name"])).mean() / 255
    assert rows[0]["score"] == scores.values[0] == pytest.approx(first)
    assert {(row["scorer"], row["version"]) for row in rows} == {("brightness", "1")}
    assert sorted(path.name for path in (folder / "scores").iterdir()) == ["brightness.parquet"]


def test_the_summary(tmp_path: Path):
    folder = make_folder(tmp_path / "images", prompts=5, per_prompt=2)
    scores = score_folder(folder, Brightness())
    summary = scores.summary()
    assert (summary.images, summary.prompts) == (10, 5)
    assert summary.mean == pytest.approx(sum(scores.values) / 10)
    prompts = [image.prompt for image in scores.images]
    assert summary.standard_error == standard_error(np.array(scores.values), prompts)


def test_kept_scores_are_used_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_folder(tmp_path / "images")
    scorer = Brightness()
    made = scores_of(folder, scorer)
    assert "scoring it now" in capsys.readouterr().err
    assert scores_of(folder, scorer) == made
    assert len(scorer.batches) == 1
    assert "scoring it now" not in capsys.readouterr().err


def test_scores_of_other_images_or_another_version_are_not_used(tmp_path: Path):
    folder = make_folder(tmp_path / "images")
    scorer = Brightness()
    score_folder(folder, scorer)
    assert read_scores(folder, scorer) is not None
    assert read_scores(folder, replace(scorer, version="2")) is None
    rows = read_rows(folder)
    write_rows(folder, [{**rows[0], "seed": 1}, *rows[1:]])
    assert read_scores(folder, scorer) is None
    write_rows(folder, rows)
    assert read_scores(folder, scorer) is not None
    file, kept = folder / rows[0]["file_name"], folder / "scores" / "brightness.parquet"
    later = kept.stat().st_mtime_ns + 1
    os.utime(file, ns=(later, later))
    assert read_scores(folder, scorer) is None


def test_a_broken_score_file_is_made_anew(tmp_path: Path):
    folder = make_folder(tmp_path / "images")
    made = score_folder(folder, Brightness())
    made.file.write_bytes(made.file.read_bytes()[:-20])
    assert scores_of(folder, Brightness()) == made


def test_a_prompt_that_cannot_be_judged_names_the_file_and_writes_nothing(tmp_path: Path):
    folder = make_folder(tmp_path / "images", prompts=5)
    rows = read_rows(folder)
    rows[3]["prompt"] = "hello there"
    write_rows(folder, rows)
    with pytest.raises(UserError, match=f"{rows[3]['file_name']}: .*'hello there'"):
        score_folder(folder, load_scorer("embedded-judge"), batch_size=2)
    assert not (folder / "scores").exists()


def test_a_broken_image_stops_before_anything_is_written(tmp_path: Path):
    folder = make_folder(tmp_path / "images")
    (folder / read_rows(folder)[1]["file_name"]).write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"metadata\.jsonl line 2: .*broken"):
        score_folder(folder, Brightness())
    assert not (folder / "scores").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    folder = make_folder(tmp_path / "images")
    (folder / "scores").write_text("a file in the way")
    with pytest.raises(UserError, match=r"cannot write .*brightness\.parquet"):
        score_folder(folder, Brightness())


def test_a_score_that_is_no_number_is_an_error(tmp_path: Path):
    class Broken(Brightness):
        def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
            return [float("nan")] * len(images)

    with pytest.raises(RuntimeError, match="score nan"):
        score_folder(make_folder(tmp_path / "images"), Broken())
