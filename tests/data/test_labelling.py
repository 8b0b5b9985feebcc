"""Scores and labels: what scorers say is written where it belongs, and rules say what a few lines of NumPy say."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import fails
from support.datasets import encoded, make_images, write_rows
from support.generated import Brightness
from support.tiny import make_pairs

from diffpref.__main__ import main
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import decode
from diffpref.data.labelling import label_dataset
from diffpref.data.rules import verdicts
from diffpref.embedded import world
from diffpref.embedded.judge import judge
from diffpref.errors import UserError
from diffpref.scorers.base import UnscorableError, load_scorer

SCORER = Path(__file__).parents[1] / "support" / "brightness.py"


def plain(grey: int, width: int = 8) -> bytes:
    return encoded(Image.new("RGB", (width, 8), (grey, grey, grey)))


def opened(folder: Path, rows: list) -> PreferenceDataset:
    return PreferenceDataset.open(write_rows(folder, rows))


def read(folder: Path) -> list:
    return list(PreferenceDataset.open(folder).rows())


@dataclass(frozen=True)
class Table:
    """A scorer that looks an image's score up by its grey value; it cannot tell of what is not in its table."""

    name: str
    table: dict[int, float]
    version: str = "1"

    def __call__(self, images, prompts):
        return [self.table.get(image.getpixel((0, 0))[0], float("nan")) for image in images]


class TestScores:
    def test_every_image_is_scored_for_its_rows_prompt(self, tmp_path):
        rng, known = np.random.default_rng(0), world.compositions()
        pictures = [encoded(Image.fromarray(world.paint(known[n], rng, 0.3))) for n in (0, 100, 200, 300)]
        prompts = [known[0].caption(), known[300].caption()]
        rows = make_pairs(2, prompt=prompts, chosen=pictures[:2], rejected=pictures[2:], rejected_prompt=["x", "y"])
        label_dataset(opened(tmp_path / "in", rows), tmp_path / "out", [partial(load_scorer, "embedded-judge")])
        found = PreferenceDataset.open(tmp_path / "out")
        for side in ("chosen", "rejected"):
            for row in range(2):
                image = decode(found.image_bytes(row, side))
                assert found.numbers[f"{side}_score_embedded_judge"][row] == judge(image, prompts[row])
        assert found.texts["rejected_prompt"] == ["x", "y"]

    def test_further_scorers_add_columns_and_the_same_one_replaces_them(self, tmp_path):
        rows = make_images(2, image=[plain(51), plain(255)], scores=[{"score_x": 1.0, "score_brightness": 7.0}] * 2)
        label_dataset(opened(tmp_path / "in", rows), tmp_path / "out", [Brightness])
        assert [row.scores for row in read(tmp_path / "out")] == [
            {"score_x": 1.0, "score_brightness": 0.2},
            {"score_x": 1.0, "score_brightness": 1.0},
        ]

    def test_what_cannot_be_scored_is_null_and_counted(self, tmp_path):
        @dataclass(frozen=True)
        class Picky:
            name: str = "picky"
            version: str = "1"

            def __call__(self, images, prompts):
                if "odd" in prompts:
                    raise UnscorableError("an odd prompt", prompts.index("odd"))
                return [float("nan") if prompt == "nan" else 1.0 for prompt in prompts]

        rows = make_images(5, prompt=["odd", "fine", "nan", "odd", "fine"])
        summary = label_dataset(opened(tmp_path / "in", rows), tmp_path / "out", [Picky])
        assert [row.scores["score_picky"] for row in read(tmp_path / "out")] == [None, 1.0, None, None, 1.0]
        assert (summary.kept, summary.missing) == (5, {"score_picky": 3})
        with pytest.raises(UserError, match=r"^picky can score no image of .*none: an odd prompt$"):
            label_dataset(opened(tmp_path / "none", make_images(2, prompt=["odd"] * 2)), tmp_path / "no", [Picky])
        assert not (tmp_path / "no").exists()

    def test_a_column_is_written_once(self, tmp_path):
        with pytest.raises(UserError, match="two scorers of one name"):
            label_dataset(opened(tmp_path / "in", make_images(2)), tmp_path / "out", [Brightness, Brightness])

    def test_many_broken_images_stop_the_work(self, tmp_path):
        dataset = opened(tmp_path / "in", make_images(20, image=[b"", b"x", *[plain(n) for n in range(18)]]))
        with pytest.raises(UserError, match=r"^over 5% of 20 rows are bad: 2 images .* row 0: image_empty"):
            label_dataset(dataset, tmp_path / "out", [Brightness])
        assert not (tmp_path / "out").exists()


class TestVerdicts:
    def test_by_hand(self):
        differences = np.array([[3.0, -1.0], [4.0, 1.0], [0.0, 0.0], [-1.0, -2.0], [1.0, np.nan]])
        mean, majority, agree = (verdicts(differences, rule) for rule in ("mean", "majority", "agree"))
        x, y = np.sqrt(26 / 4), np.sqrt(6 / 4)  # root mean squares of the four whole rows
        assert mean.scales == pytest.approx([x, y])
        assert mean.labels.tolist()[:4] == [1.0, 1.0, 0.5, 0.0] and np.isnan(mean.labels[4])
        assert mean.margins[0] == pytest.approx((3 / x - 1 / y) / 2)
        assert majority.labels.tolist()[:4] == [0.5, 1.0, 0.5, 0.0]
        assert majority.margins.tolist()[:4] == [0.0, 1.0, 0.0, 1.0]
        assert np.isnan(agree.labels[[0, 4]]).all() and agree.labels[[1, 2, 3]].tolist() == [1.0, 0.5, 0.0]
        assert agree.reasons == ["scorers disagree", "", "", "", "without a score"]

    @pytest.mark.parametrize("rule", ["mean", "majority", "agree"])
    def test_against_a_plain_loop(self, rule):
        rng = np.random.default_rng(5)
        differences = rng.integers(-2, 3, (300, 3)) * np.array([1.0, 100.0, 0.01])
        scales = [float(np.mean([row[s] ** 2 for row in differences])) ** 0.5 for s in range(3)]
        found = verdicts(differences, rule)
        for row, label in zip(differences, found.labels, strict=True):
            votes = [int(value > 0) - int(value < 0) for value in row]
            mean = sum(value / scale for value, scale in zip(row, scales, strict=True)) / 3
            told = sum(votes) if rule == "majority" else mean
            expected = 1.0 if told > 1e-12 else 0.0 if told < -1e-12 else 0.5
            if rule == "agree" and len(set(votes)) > 1:
                assert np.isnan(label)
            elif abs(told) > 1e-12 or rule != "mean":
                assert label == expected
        assert len({*found.labels[np.isfinite(found.labels)]}) == 3

    @pytest.mark.parametrize("rule", ["mean", "majority", "agree"])
    def test_exchanged_images_exchange_the_verdict(self, rule):
        differences = np.random.default_rng(1).normal(0.7, 1, (50, 2))
        once, turned = verdicts(differences, rule), verdicts(-differences, rule)
        assert np.array_equal(once.labels, 1 - turned.labels, equal_nan=True)
        assert np.array_equal(once.margins, turned.margins)


class TestRules:
    def labelled(self, tmp_path, rule):
        a = Table("a", {0: 0.0, 1: 3.0, 2: 4.0, 3: 1.0})
        b = Table("b-b", {0: 0.0, 1: -1.0, 2: 1.0, 3: 1.0, 4: 5.0})
        rows = make_pairs(
            4,
            chosen=[plain(n) for n in (0, 2, 3, 4)],
            rejected=[plain(n) for n in (1, 0, 3, 0)],
            label=[1.0, 1.0, 0.0, 1.0],
            margin=[9.0] * 4,
        )
        dataset = opened(tmp_path / "in", rows)
        return label_dataset(dataset, tmp_path / "out", [lambda: a, lambda: b], rule), read(tmp_path / "out")

    def test_labels_margins_and_provenance(self, tmp_path):
        summary, rows = self.labelled(tmp_path, "mean")  # differences: (-3, 1), (4, 1), (0, 0), (unknown, 5)
        x, y = (25 / 3) ** 0.5, (2 / 3) ** 0.5
        assert [row.label for row in rows] == [1.0, 1.0, 0.5]
        assert [row.margin for row in rows] == pytest.approx([(1 / y - 3 / x) / 2, (4 / x + 1 / y) / 2, 0.0])
        assert rows[0].scores == {
            "chosen_score_a": 0.0,
            "rejected_score_a": 3.0,
            "chosen_score_b_b": 0.0,
            "rejected_score_b_b": -1.0,
        }
        assert summary.dropped == {"without a score": 1}
        told = json.loads((tmp_path / "out" / "dataset.json").read_text())
        assert told["options"] == {"scorer": "a,b-b", "version": "1,1", "rule": "mean"}
        assert told["outcome"] == {
            "labels_changed": 1,
            "scale_a": pytest.approx(x),
            "scale_b_b": pytest.approx(y),
        }

    def test_agreement_drops_and_counts(self, tmp_path):
        summary, rows = self.labelled(tmp_path, "agree")
        assert [(row.id, row.label) for row in rows] == [("pair-1", 1.0), ("pair-2", 0.5)]
        assert summary.dropped == {"scorers disagree": 1, "without a score": 1}

    def test_without_a_rule_labels_stay(self, tmp_path):
        summary, rows = self.labelled(tmp_path, None)
        assert [(row.label, row.margin) for row in rows] == [(1.0, 9.0), (1.0, 9.0), (0.0, 9.0), (1.0, 9.0)]
        assert summary.missing == {"chosen_score_a": 1}

    def test_single_images_have_no_rule(self, tmp_path):
        with pytest.raises(UserError, match=r"--rule: .* holds single images"):
            label_dataset(opened(tmp_path / "in", make_images(2)), tmp_path / "out", [Brightness], "mean")


class TestCommand:
    def test_a_scorer_of_ones_own_and_a_rule(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("SCORED", str(tmp_path / "scored"))
        rows = make_pairs(3, chosen=[plain(n) for n in (10, 20, 30)], rejected=[plain(n) for n in (20, 10, 30)])
        write_rows(tmp_path / "in", rows)
        label = ["data", "label", str(tmp_path / "in"), str(tmp_path / "out"), "--scorer", str(SCORER)]
        assert main([*label, "--rule", "majority", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        told = shown["options"]
        assert (told["scorer"], told["rule"], shown["outcome"]["labels_changed"]) == ("brightness", "majority", 2)
        assert told["version"].startswith("1-")
        assert [row.label for row in read(tmp_path / "out")] == [0.0, 1.0, 0.5]
        assert len((tmp_path / "scored").read_text().splitlines()) == 3  # equal questions are asked once
        assert main([*label, "--rule", "agree", "--overwrite"]) == 0  # the scores are looked up
        assert len((tmp_path / "scored").read_text().splitlines()) == 3  # equal questions are asked once

    def test_files_that_give_no_scorer(self, tmp_path, capsys):
        write_rows(tmp_path / "in", make_images(2))
        broken, empty, wrong = (tmp_path / f"{name}.py" for name in ("broken", "empty", "wrong"))
        broken.write_text("def load(:")
        empty.write_text("x = 1")
        wrong.write_text("def load(device):\n    return 3")
        label = ["data", "label", str(tmp_path / "in"), str(tmp_path / "out"), "--scorer"]
        assert "cannot be loaded: SyntaxError" in fails(capsys, [*label, str(broken)])
        assert "has no function load(device)" in fails(capsys, [*label, str(empty)])
        assert "load gives int" in fails(capsys, [*label, str(wrong)])
        assert "cannot read the scorer" in fails(capsys, [*label, str(tmp_path / "none.py")])
        assert "--workers: 0 is not above 0" in fails(capsys, [*label, "embedded-judge", "--workers", "0"])
        assert not (tmp_path / "out").exists()

    def test_ray_is_not_started_by_every_rank(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        label = ["data", "label", str(tmp_path / "in"), str(tmp_path / "out"), "--engine", "ray"]
        assert "start it once, without torchrun" in fails(capsys, label)
