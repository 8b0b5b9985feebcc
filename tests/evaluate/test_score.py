"""Scores are kept beside the images, whole, by any number of scorers in one pass, and nothing is scored twice."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.datasets import encoded, make_images
from support.datasets import write_rows as write_dataset
from support.generated import Brightness, make_folder, read_rows, write_rows
from support.rewards import PREPARED, channel_reward
from support.tiny import make_pairs

from diffpref.__main__ import main
from diffpref.data.engine import answering
from diffpref.errors import UserError
from diffpref.evaluate.score import IDENTITY, all_scores_of, read_scores, score, scores_of
from diffpref.evaluate.statistics import standard_error
from diffpref.evaluate.targets import folder_target, open_target
from diffpref.scorers.base import identity_of, load_scorer

ROOT = Path(__file__).parents[2]
SCORER = ROOT / "tests" / "support" / "brightness.py"


def score_of(folder: Path, *scorers, **options):
    return score([open_target(folder)], [lambda scorer=scorer: scorer for scorer in scorers], **options)


def channel(folder: Path, name: str, number: int) -> float:
    return np.asarray(Image.open(folder / name).convert("RGB"), np.float64)[..., number].mean() / 255


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch):
    """What rewards and the scorer of support/brightness.py note."""
    PREPARED.clear()
    monkeypatch.setenv("SCORED", str(tmp_path / "scored"))
    return tmp_path / "scored"


class TestOnePass:
    def test_an_image_is_decoded_once_and_prepared_once_in_each_way(self, tmp_path, monkeypatch):
        decoded, decode = [], answering.decode
        monkeypatch.setattr(answering, "decode", lambda data: decoded.append(data) or decode(data))
        folder = make_folder(tmp_path / "images", prompts=5, per_prompt=2)
        rewards = [channel_reward("red", 0), channel_reward("green", 1), channel_reward("blue", 2, side=8)]
        found = score_of(folder, *rewards, Brightness(), batch_size=3)
        assert len(decoded) == 10
        assert sorted(side for side, _ in PREPARED) == [4] * 10 + [8] * 10
        names = [row["file_name"] for row in read_rows(folder)]
        for number, scores in enumerate(found[:3]):
            assert scores.values == pytest.approx(
                [channel(folder, name, number) for name in names], abs=2e-3
            )  # shrunk to bytes
        mean = [np.mean([channel(folder, name, number) for number in range(3)]) for name in names]
        assert found[3].values == pytest.approx(mean)

    def test_threads_prepare_ahead_of_the_network(self, tmp_path):
        """The network waits until more than its own batch is prepared, which only another thread can do."""
        folder = make_folder(tmp_path / "images", prompts=12)
        reward = channel_reward("red", 0)
        waited = []

        def measure(images, prompts):
            until = time.monotonic() + 20
            while not waited and len(PREPARED) < 6 and time.monotonic() < until:
                time.sleep(0.001)
            waited.append(len(PREPARED))
            return reward.measure(images, prompts)

        score_of(folder, replace(reward, measure=measure), batch_size=2)
        assert waited[0] >= 6
        assert all(thread != "MainThread" for _, thread in PREPARED)

    def test_a_further_scorer_alone_is_asked(self, tmp_path):
        folder = make_folder(tmp_path / "images", prompts=3)
        first, second = Brightness(), Brightness("other")
        score_of(folder, first)
        score_of(folder, first, second)
        assert (first.batches, second.batches) == ([3], [3])

    def test_only_new_images_are_scored(self, tmp_path):
        folder, scorer = make_folder(tmp_path / "images", prompts=4), Brightness()
        before = score_of(folder, scorer)[0]
        Image.new("RGB", (8, 8), "white").save(folder / "new.png")
        write_rows(folder, [*read_rows(folder), {"file_name": "new.png", "prompt": "x", "index": 0, "seed": 1}])
        after = score_of(folder, scorer)[0]
        assert scorer.batches == [4, 1] and after.values == (*before.values, 1.0)

    def test_two_scorers_of_one_name_are_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"two scorers of one name \(brightness\)"):
            score_of(make_folder(tmp_path / "images"), Brightness(), Brightness())


class TestFiles:
    def test_scores_are_written_in_the_folders_order_with_the_identity(self, tmp_path):
        folder = make_folder(tmp_path / "images", prompts=5, per_prompt=2)
        reward = channel_reward("red", 0)
        (scores,) = score_of(folder, reward)
        table = pq.read_table(folder / "scores" / "red.parquet")
        assert json.loads(table.schema.metadata[IDENTITY]) == identity_of(reward)
        assert identity_of(reward).items() >= {"scorer": "red", "channel": "0", "weights": "1"}.items()
        rows = table.to_pylist()
        assert [{key: row[key] for key in ("file_name", "prompt", "index", "seed")} for row in rows] == read_rows(
            folder
        )
        assert [row["score"] for row in rows] == list(scores.values)
        assert {(row["scorer"], row["version"], row["why"]) for row in rows} == {("red", reward.version, None)}

    def test_the_summary(self, tmp_path):
        folder = make_folder(tmp_path / "images", prompts=5, per_prompt=2)
        (scores,) = score_of(folder, Brightness())
        summary = scores.summary()
        assert (summary.images, summary.prompts, summary.missing, summary.side) == (10, 5, 0, "")
        assert summary.mean == pytest.approx(sum(scores.values) / 10)
        prompts = [image.prompt for image in scores.images]
        assert summary.standard_error == pytest.approx(standard_error(np.array(scores.values), prompts))

    def test_a_broken_image_is_named_and_counted_and_the_run_goes_on(self, tmp_path, capsys):
        folder = make_folder(tmp_path / "images")
        name = read_rows(folder)[1]["file_name"]
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n")
        found = score_of(folder, Brightness(), channel_reward("red", 0))
        assert capsys.readouterr().err.count(f"warning: {folder / name}: cannot be decoded") == 1
        for scores in found:
            assert [np.isnan(value) for value in scores.values] == [False, True, False, False]
            summary = scores.summary()
            assert (summary.images, summary.missing) == (3, 1)
            assert summary.mean == pytest.approx(np.nanmean(scores.values))
        with pytest.raises(UserError, match=f"1 images of .* have no score by brightness; such as .*{name}"):
            scores_of(folder, Brightness())

    def test_a_prompt_that_cannot_be_judged_has_no_score(self, tmp_path, capsys):
        folder = make_folder(tmp_path / "images", prompts=5)
        rows = read_rows(folder)
        rows[3]["prompt"] = "hello there"
        write_rows(folder, rows)
        assert main(["score", str(folder), "--json"]) == 0
        printed = capsys.readouterr()
        assert f"{rows[3]['file_name']}: no score by embedded-judge: " in printed.err and "'hello there'" in printed.err
        assert [each["missing"] for each in json.loads(printed.out)] == [1]
        write_rows(folder, [{**row, "prompt": "hello there", "index": n} for n, row in enumerate(rows)])
        assert main(["score", str(folder)]) == 2
        assert "diffpref: embedded-judge can score no image of" in capsys.readouterr().err

    def test_a_score_that_is_no_number_is_none(self, tmp_path):
        class Broken(Brightness):
            def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
                return [float("nan")] * len(images)

        (scores,) = score_of(make_folder(tmp_path / "images"), Broken())
        assert (scores.summary().mean, scores.summary().missing) == (None, 4)

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path):
        folder = make_folder(tmp_path / "images")
        (folder / "scores").write_text("a file in the way")
        with pytest.raises(UserError, match=r"cannot write .*scores"):
            score_of(folder, Brightness())


class TestVersions:
    def test_scores_of_another_version_are_refused_with_both_identities(self, tmp_path):
        folder = make_folder(tmp_path / "images")
        old, new = channel_reward("red", 0), channel_reward("red", 0, version="2")
        (before,) = score_of(folder, old)
        message = rf"holds scores of red {old.version}, weights 1, not of red {new.version}, weights 2; --overwrite"
        for again in (lambda: score_of(folder, new), lambda: scores_of(folder, new)):
            with pytest.raises(UserError, match=message):
                again()
        assert scores_of(folder, old) == before
        score_of(folder, new, overwrite=True)
        assert scores_of(folder, new).version == new.version

    def test_kept_scores_are_used_again(self, tmp_path, capsys):
        folder = make_folder(tmp_path / "images")
        first, second = Brightness(), Brightness("other")
        made = scores_of(folder, first)
        assert "has no current scores by brightness 1: scoring it now" in capsys.readouterr().err
        assert all_scores_of(folder, [second, first])[1] == made
        assert (first.batches, second.batches) == ([4], [4])
        assert "by brightness" not in capsys.readouterr().err

    def test_scores_of_other_images_are_not_used(self, tmp_path):
        folder = make_folder(tmp_path / "images")
        scorer = Brightness()
        scores_of(folder, scorer)
        assert read_scores(folder_target(folder), scorer) is not None
        rows = read_rows(folder)
        write_rows(folder, [{**rows[0], "seed": 1}, *rows[1:]])
        assert read_scores(folder_target(folder), scorer) is None
        write_rows(folder, rows)
        Image.new("RGB", (8, 8), "white").save(folder / rows[0]["file_name"])
        later = (folder / "scores" / "brightness.parquet").stat().st_mtime_ns + 1
        os.utime(folder / rows[0]["file_name"], ns=(later, later))
        assert read_scores(folder_target(folder), scorer) is None
        assert scores_of(folder, scorer).values[0] == 1.0

    def test_a_broken_score_file_is_made_anew(self, tmp_path):
        folder = make_folder(tmp_path / "images")
        made = scores_of(folder, Brightness())
        made.file.write_bytes(made.file.read_bytes()[:-20])
        assert scores_of(folder, Brightness()) == made

    def test_a_ledger_of_another_tool_is_refused(self, tmp_path):
        folder = make_folder(tmp_path / "images")
        score_of(folder, Brightness())
        (stage,) = (folder / "scores" / "ledger").glob("score-*/stage.json")
        stage.write_text(stage.read_text().replace('"version": "1"', '"version": "7"'))
        with pytest.raises(UserError, match=r"holds answers of .*'version': '7'.* not of .*'version': '1'"):
            score_of(folder, Brightness())


def test_a_combination_is_printed_over_all_folders_and_kept_in_none(tmp_path, capsys):
    folders = [make_folder(tmp_path / name, clutter=clutter) for name, clutter in (("a", 0.1), ("b", 0.6))]
    wanted = ["--scorer", f"{SCORER},embedded-judge", "--combine", "embedded-judge:2,brightness:0"]
    assert main(["score", *map(str, folders), *wanted, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    name = "zscore(embedded-judge:2,brightness:0)"
    assert [each["scorer"] for each in found] == ["brightness", "embedded-judge"] * 2 + [name] * 2
    assert [each["file"] for each in found[4:]] == ["", ""]
    values = [scores_of(folder, load_scorer("embedded-judge")).values for folder in folders]
    both = np.concatenate(values)
    for each, own in zip(found[4:], values, strict=True):
        assert each["mean"] == pytest.approx(2 * (np.mean(own) - both.mean()) / both.std())
    assert {file.name for file in (folders[0] / "scores").glob("*.parquet")} == {
        "brightness.parquet",
        "embedded-judge.parquet",
    }
    assert main(["score", str(folders[0]), *wanted[:2], "--combine", "light"]) == 2
    assert "combination: there are no scores by 'light'" in capsys.readouterr().err


class TestDatasets:
    def test_pairs_and_single_images(self, tmp_path, capsys):
        white, black = (encoded(Image.new("RGB", (8, 8), colour)) for colour in ("white", "black"))
        pairs = write_dataset(tmp_path / "pairs", make_pairs(3, chosen=[white, white, black], rejected=[black] * 3))
        single = write_dataset(tmp_path / "single", make_images(2, image=[white, black]))
        assert main(["score", str(pairs), str(single), "--scorer", str(SCORER), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        told = [(each["folder"], each["side"], each["mean"], each["images"], each["prompts"]) for each in found]
        assert told == [
            (str(pairs), "chosen", pytest.approx(2 / 3), 3, 2),
            (str(pairs), "rejected", 0.0, 3, 2),
            (str(single), "image", 0.5, 2, len({row.prompt for row in make_images(2)})),
        ]
        rows = pq.read_table(tmp_path / "pairs.scores" / "train" / "brightness.parquet").to_pylist()
        assert [(row["id"], row["side"], row["score"]) for row in rows[:3]] == [
            ("pair-0", "chosen", 1.0),
            ("pair-0", "rejected", 0.0),
            ("pair-1", "chosen", 1.0),
        ]
        assert [path.name for path in pairs.iterdir() if "score" in path.name] == []

    def test_labelling_takes_what_scoring_found(self, tmp_path, notes):
        pairs = write_dataset(tmp_path / "pairs", make_pairs(3))
        assert main(["score", str(pairs), "--scorer", str(SCORER)]) == 0
        asked = notes.read_text()
        assert main(["data", "label", str(pairs), str(tmp_path / "out"), "--scorer", str(SCORER)]) == 0
        assert notes.read_text() == asked


def test_dros_layout(tmp_path, capsys):
    for name in ("000", "001"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "caption.txt").write_text(f"prompt {name}")
        Image.new("RGB", (8, 8), "white").save(tmp_path / "in" / name / "0.png")
    assert main(["score", str(tmp_path / "in"), "--scorer", str(SCORER)]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["folder", "scorer", "mean", "error", "images", "prompts", "missing"]
    assert line.split() == [str(tmp_path / "in"), "brightness", "1.0000", "0.0000", "2", "2", "0"]


class TestProcesses:
    def run(self, folder: Path, **variables: str) -> subprocess.Popen:
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
        return subprocess.Popen(
            [sys.executable, "-m", "diffpref", "score", str(folder), "--scorer", str(SCORER), "--json"],
            env=os.environ | {"PYTHONPATH": path, "SCORED": f"{folder}.scored", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def test_killed_and_run_again_it_scores_what_is_missing(self, tmp_path):
        folder = make_folder(tmp_path / "images", prompts=150, per_prompt=2, clutter=0.5)
        asked = Path(f"{folder}.scored")
        process = self.run(folder, SCORING_TIME="0.005")
        while process.poll() is None and not (asked.exists() and len(asked.read_text().splitlines()) > 140):
            time.sleep(0.02)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (folder / "scores" / "brightness.parquet").exists()
        out, error = self.run(folder).communicate()
        assert [each["images"] for each in json.loads(out)] == [300], error
        assert len(asked.read_text().splitlines()) <= 300 + 128  # the unit in work is lost

    def test_a_rank_above_0_works_and_writes_nothing(self, tmp_path, monkeypatch, capsys):
        folder, scorer = make_folder(tmp_path / "images", prompts=4), Brightness()
        monkeypatch.setenv("RANK", "1")
        assert score_of(folder, scorer) == []
        assert not (folder / "scores" / "brightness.parquet").exists()
        monkeypatch.setenv("RANK", "0")
        assert len(score_of(folder, scorer)[0].values) == 4
        assert scorer.batches == [4]
