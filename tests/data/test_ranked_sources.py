"""Ranked groups and lists of images: HPDv2, HPDv3 and ImageRewardDB become pairs in the right order."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import fails
from support.datasets import jpeg

from diffpref.__main__ import main
from diffpref.data import listed
from diffpref.data.groups import pairs_from
from diffpref.data.import_options import ImportOptions
from diffpref.data.importing import import_source
from diffpref.data.listed import entries, image_file
from diffpref.data.schema import Dropped, Found, Group
from diffpref.errors import UserError
from diffpref.evaluate.prompts import read_prompts


def written(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def orders(folder: Path) -> list[tuple[str, str]]:
    return [(row["chosen_id"], row["rejected_id"]) for row in written(folder)]


def make_list(folder: Path, name: str, content: list[dict], images: dict[str, int]) -> Path:
    """A list in JSON and its image files, each a picture of its number."""
    for place, number in images.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(jpeg(number))
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def group(scores: list[float], **changes) -> Group:
    images = tuple(jpeg(number) for number in range(len(scores)))
    return Group("f", 3, "f-3", "p", images, tuple(map(float, scores)), "test", **changes)


class TestGroups:
    def test_pairs_carry_what_the_group_knows(self):
        (found, *_) = pairs_from(group([1, 3], names=("a", "b"), models=("m", "n")), "all", 0.0)
        assert isinstance(found, Found)
        pair = found.record
        assert (pair.id, pair.group_id, pair.prompt, pair.margin, pair.label) == ("f-3-1-0", "f-3", "p", 2.0, 1.0)
        assert (pair.chosen, pair.rejected) == (jpeg(1), jpeg(0))
        assert (pair.chosen_id, pair.rejected_id, pair.chosen_model, pair.rejected_model) == ("b", "a", "n", "m")

    @pytest.mark.parametrize(
        ("how", "least", "pairs", "ties", "low"),
        [("all", 2, 1, 1, 4), ("all", 0, 5, 1, 0), ("adjacent", 1, 2, 1, 0), ("best-worst", 9, 0, 0, 1)],
    )
    def test_every_pair_of_the_choice_is_counted(self, how, least, pairs, ties, low):
        rows = pairs_from(group([4, 3, 3, 2]), how, least)
        reasons = [row.reason for row in rows if isinstance(row, Dropped)]
        assert len(rows) - len(reasons) == pairs
        assert (reasons.count("tie"), reasons.count("low_margin")) == (ties, low)

    def test_agreement_is_the_share_of_annotators(self):
        ballots = ((2.0, 1.0), (2.0, 1.0), (1.0, 2.0), (1.0, 1.0))
        (found,) = pairs_from(group([5, 4], ballots=ballots), "all", 0.0)
        assert found.agreement == 2.5 / 4

    def test_one_image_gives_no_pair(self):
        (row,) = pairs_from(group([1]), "all", 0.0)
        assert (row.reason, row.bad) == ("single_image", False)


class TestHPDv2:
    def train(self, tmp_path: Path) -> Path:
        content = [
            {"prompt": "one", "file_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0]},
            {"prompt": "two", "file_path": ["a.jpg", "c.jpg"], "human_preference": [0, 1]},
        ]
        images = {"train/a.jpg": 0, "train/b.jpg": 1, "train/c.jpg": 2}
        return make_list(tmp_path / "in", "train.json", content, images)

    def ranked(self, tmp_path: Path) -> Path:
        entry = {
            "prompt": "one",
            "image_path": ["a.jpg", "b.jpg", "c.jpg"],
            "rank": [2, 0, 1],
            "raw_annotations": [{"rank": [2, 0, 1], "user_hash": "x"}, {"rank": [1, 0, 2], "user_hash": "y"}],
        }
        images = {"test/a.jpg": 0, "test/b.jpg": 1, "test/c.jpg": 2}
        return make_list(tmp_path / "in", "test.json", [entry], images)

    def test_the_preferred_image_of_two(self, tmp_path):
        summary = import_source("hpdv2", self.train(tmp_path), tmp_path / "out")
        rows = written(tmp_path / "out")
        assert [(row["chosen"]["bytes"], row["rejected"]["bytes"]) for row in rows] == [
            (jpeg(0), jpeg(1)),
            (jpeg(2), jpeg(0)),
        ]
        assert [row["prompt"] for row in rows] == ["one", "two"]
        assert summary.format == "diffpref-pairs-1"
        assert (summary.read, summary.kept) == (2, 2)

    @pytest.mark.parametrize(
        ("pairing", "expected"),
        [
            (None, [("b.jpg", "c.jpg"), ("b.jpg", "a.jpg"), ("c.jpg", "a.jpg")]),
            ("best-worst", [("b.jpg", "a.jpg")]),
            ("adjacent", [("b.jpg", "c.jpg"), ("c.jpg", "a.jpg")]),
        ],
    )
    def test_the_lowest_rank_is_the_best(self, tmp_path, pairing, expected):
        options = ImportOptions(split="test", pairing=pairing)
        summary = import_source("hpdv2", self.ranked(tmp_path), tmp_path / "out", options)
        assert orders(tmp_path / "out") == expected
        assert summary.options.get("pairing") == pairing

    def test_margin_and_agreement(self, tmp_path, capsys):
        command = ["data", "import", "hpdv2", str(self.ranked(tmp_path)), str(tmp_path / "out"), "--split", "test"]
        assert main([*command, "--min-margin", "2", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["dropped"] == {"low_margin": 2}
        assert told["options"]["min_margin"] == 2.0
        assert orders(tmp_path / "out") == [("b.jpg", "a.jpg")]
        assert main([*command[:4], str(tmp_path / "agreed"), *command[5:], "--min-agreement", "0.6"]) == 0
        assert orders(tmp_path / "agreed") == [("b.jpg", "c.jpg"), ("b.jpg", "a.jpg")]  # of c and a, one each way

    def test_a_missing_and_a_broken_image_take_only_their_own_pairs(self, tmp_path):
        source = self.ranked(tmp_path)
        (source / "test/c.jpg").unlink()
        summary = import_source("hpdv2", source, tmp_path / "out", ImportOptions(split="test", max_bad_share=1))
        assert orders(tmp_path / "out") == [("b.jpg", "a.jpg")]
        assert summary.dropped == {"image_empty": 2}
        assert summary.bad_rows[0].detail == "the rejected image c.jpg: no bytes"

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"prompt": None}, "null_caption"),
            ({"prompt": " "}, "empty_caption"),
            ({"file_path": ["a.jpg"]}, "no_images"),
            ({"human_preference": [1]}, "no_ranking"),
            ({"human_preference": "first"}, "no_ranking"),
        ],
    )
    def test_entries_that_are_no_group(self, tmp_path, change, reason):
        source = self.train(tmp_path)
        content = json.loads((source / "train.json").read_text())
        (source / "train.json").write_text(json.dumps([content[0], content[1] | change]))
        summary = import_source("hpdv2", source, tmp_path / "out", ImportOptions(max_bad_share=1))
        assert summary.dropped == {reason: 1}
        assert summary.bad_rows[0].row == 1

    def test_keys_of_another_form(self, tmp_path, capsys):
        make_list(tmp_path / "in", "train.json", [{"promt": "p", "file_path": [], "rank": []}], {})
        line = fails(capsys, ["data", "import", "hpdv2", str(tmp_path / "in"), str(tmp_path / "out")])
        assert line == f"{tmp_path}/in/train.json: entries have no 'prompt' (did you mean 'promt'?)"

    def test_no_list_of_the_split(self, tmp_path, capsys):
        line = fails(capsys, ["data", "import", "hpdv2", str(self.ranked(tmp_path)), str(tmp_path / "out")])
        assert line.endswith("holds no train.json or train.jsonl: give the file itself, or choose another --split")


class TestHPDv2Benchmark:
    def source(self, tmp_path: Path) -> Path:
        images = {f"benchmark_imgs/{model}/anime/0000{n}.jpg": n for model in ("SD", "DALL-E") for n in (0, 1)}
        folder = make_list(tmp_path / "in", "photo.json", [], images)
        (folder / "anime.json").write_text(json.dumps(["a cat", "a dog"]))
        return folder

    def test_each_image_has_the_prompt_of_its_number_and_its_model(self, tmp_path):
        summary = import_source("hpdv2-benchmark", self.source(tmp_path), tmp_path / "out")
        found = [(row["image_model"], row["prompt"], row["image"]["bytes"]) for row in written(tmp_path / "out")]
        assert found == [
            (model, prompt, jpeg(n)) for model in ("DALL-E", "SD") for n, prompt in enumerate(["a cat", "a dog"])
        ]
        assert written(tmp_path / "out")[3]["id"] == "SD/anime/00001"
        assert summary.format == "diffpref-images-1"

    def test_an_image_without_a_prompt(self, tmp_path):
        source = self.source(tmp_path)
        (source / "benchmark_imgs/SD/anime/00007.jpg").write_bytes(jpeg(7))
        summary = import_source("hpdv2-benchmark", source, tmp_path / "out", ImportOptions(max_bad_share=1))
        assert summary.dropped == {"no_prompt": 1}
        assert summary.kept == 4

    def test_prompts_alone_are_for_generate(self, tmp_path, capsys):
        folder = make_list(tmp_path / "in", "anime.json", [], {})
        (folder / "anime.json").write_text(json.dumps(["a cat", " ", "a dog"]))
        line = fails(capsys, ["data", "import", "hpdv2-benchmark", str(folder), str(tmp_path / "out")])
        assert line.endswith("prompts alone are read by `diffpref generate --prompts FILE.json`")
        assert [prompt.text for prompt in read_prompts(str(folder / "anime.json"))] == ["a cat", "a dog"]

    @pytest.mark.parametrize("text", ['{"a": 1}', "[1, 2]", "[", '["a"'])
    def test_lists_that_are_no_prompts(self, tmp_path, text):
        folder = make_list(tmp_path / "in", "anime.json", [], {})
        (folder / "anime.json").write_text(text)
        with pytest.raises(UserError, match=r"anime\.json (is no array of prompts|cannot be read as JSON)"):
            import_source("hpdv2-benchmark", folder, tmp_path / "out")
        with pytest.raises(UserError, match=r"anime\.json (is no array of prompts|cannot be read as JSON)"):
            read_prompts(str(folder / "anime.json"))


class TestHPDv3:
    def source(self, tmp_path: Path) -> Path:
        content = [
            {
                "prompt": "one",
                "path1": "images/a.jpg",
                "path2": "b.jpg",
                "model1": "m",
                "model2": "n",
                "confidence": 0.9,
            },
            {"prompt": "two", "path1": "images/b.jpg", "path2": "images/a.jpg", "choice_dist": [2, 6]},
            {"prompt": "three", "path1": "images/b.jpg", "path2": "images/a.jpg"},
        ]
        return make_list(tmp_path / "in", "train.json", content, {"images/a.jpg": 0, "images/b.jpg": 1})

    def test_path1_is_always_the_better_one(self, tmp_path):
        import_source("hpdv3", self.source(tmp_path), tmp_path / "out")
        rows = written(tmp_path / "out")
        assert [row["chosen"]["bytes"] for row in rows] == [jpeg(0), jpeg(1), jpeg(1)]
        assert [row["rejected"]["bytes"] for row in rows] == [jpeg(1), jpeg(0), jpeg(0)]
        assert (rows[0]["chosen_model"], rows[0]["rejected_model"], rows[0]["source"]) == ("m", "n", "hpdv3")
        assert [row["label"] for row in rows] == [1.0] * 3

    def test_confidence_and_votes_are_the_agreement(self, tmp_path):
        options = ImportOptions(min_agreement=0.8)
        summary = import_source("hpdv3", self.source(tmp_path), tmp_path / "out", options)
        assert [row["prompt"] for row in written(tmp_path / "out")] == ["one"]
        assert summary.dropped == {"low_agreement": 1, "no_agreement": 1}

    def test_paths_that_lead_out_are_no_images(self, tmp_path):
        source = self.source(tmp_path)
        (tmp_path / "secret.jpg").write_bytes(jpeg(9))
        assert image_file(source, (), "../secret.jpg") == b""
        assert image_file(source, (), str(tmp_path / "secret.jpg")) == b""
        (source / "link.jpg").symlink_to(tmp_path / "secret.jpg")
        assert image_file(source, (), "link.jpg") == b""
        assert image_file(source, ("images",), "a.jpg") == jpeg(0)

    def test_pairs_are_no_groups(self, tmp_path, capsys):
        command = ["data", "import", "hpdv3", str(self.source(tmp_path)), str(tmp_path / "out")]
        assert fails(capsys, [*command, "--pairing", "all"]) == "--pairing is of ranked groups, and hpdv3 holds pairs"
        assert (
            fails(capsys, [*command, "--min-margin", "1"]) == "--min-margin is of ranked groups, and hpdv3 holds pairs"
        )


class TestImageReward:
    def rows(self) -> dict[str, list]:
        return {
            "prompt_id": ["1", "2", "1", "1", "2"],
            "prompt": ["one", "two", "one", "one", "two"],
            "rank": [3, 1, 1, 3, 2],
            "image_path": [f"images/train/train_1/{name}.webp" for name in "abcde"],
        }

    def source(self, tmp_path: Path) -> Path:
        images = {name: number for number, name in enumerate(self.rows()["image_path"])}
        folder = make_list(tmp_path / "in", "unused.json", [], images)
        pq.write_table(pa.table(self.rows()), folder / "metadata-train.parquet")
        return folder

    def test_rank_1_is_the_best_and_rows_may_stand_anywhere(self, tmp_path):
        summary = import_source("imagereward", self.source(tmp_path), tmp_path / "out")
        names = [(Path(a).stem, Path(b).stem) for a, b in orders(tmp_path / "out")]
        assert names == [("c", "a"), ("c", "d"), ("b", "e")]
        assert summary.dropped == {"tie": 1}
        assert [row["margin"] for row in written(tmp_path / "out")] == [2.0, 2.0, 1.0]
        assert written(tmp_path / "out")[0]["chosen"]["bytes"] == jpeg(2)

    def test_images_in_the_parquet_file(self, tmp_path):
        (tmp_path / "in").mkdir()
        rows = {"prompt_id": ["1", "1", "2"], "prompt": ["one", "one", "two"], "rank": [2, 1, 1]}
        table = pa.table({**rows, "image": [jpeg(0), jpeg(1), jpeg(2)]})
        pq.write_table(table, tmp_path / "in" / "train.parquet")
        summary = import_source("imagereward", tmp_path / "in", tmp_path / "out")
        assert [row["chosen"]["bytes"] for row in written(tmp_path / "out")] == [jpeg(1)]
        assert summary.dropped == {"single_image": 1}

    def test_a_list_in_json_either_way(self, tmp_path):
        images = {"a.webp": 0, "b.webp": 1}
        grouped = [{"prompt": "one", "generations": ["a.webp", "b.webp"], "ranking": [2, 1]}]
        flat = [
            {"prompt_id": "1", "prompt": "one", "rank": 2 - n, "image_path": f"{name}.webp"}
            for n, name in enumerate("ab")
        ]
        for name, content in (("grouped", grouped), ("flat", flat)):
            source = make_list(tmp_path / name, "train.json", content, images)
            import_source("imagereward", source, tmp_path / f"{name}-out")
            assert orders(tmp_path / f"{name}-out") == [("b.webp", "a.webp")]

    @pytest.mark.parametrize("column", ["prompt_id", "prompt", "rank"])
    def test_a_missing_column(self, tmp_path, capsys, column):
        source = self.source(tmp_path)
        pq.write_table(pa.table(self.rows()).drop_columns([column]), source / "metadata-train.parquet")
        line = fails(capsys, ["data", "import", "imagereward", str(source), str(tmp_path / "out")])
        assert f"has no column {column!r}" in line

    def test_an_image_without_a_rank(self, tmp_path):
        source = self.source(tmp_path)
        rows = self.rows() | {"rank": [3, None, 1, 3, 2]}
        pq.write_table(pa.table(rows), source / "metadata-train.parquet")
        summary = import_source("imagereward", source, tmp_path / "out", ImportOptions(max_bad_share=1))
        assert summary.dropped == {"tie": 1, "no_ranking": 1}


class TestLists:
    def test_streamed_entries_are_those_of_the_json_module(self, tmp_path, monkeypatch):
        content = [{"n": n, "text": "é" * n, "list": [{"a": [n, "]"]}]} for n in range(50)]
        array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
        array.write_text(json.dumps(content, indent=1), encoding="utf-8")
        lines.write_text("\n".join(json.dumps(each) for each in content) + "\n", encoding="utf-8")
        for chunk in (1, 7, 64, 2**20):
            monkeypatch.setattr(listed, "CHUNK", chunk)
            assert list(entries(array)) == list(entries(lines)) == content

    def test_empty_lists(self, tmp_path):
        for text in ("", "[]", " [ ] "):
            (tmp_path / "a.json").write_text(text)
            assert list(entries(tmp_path / "a.json")) == []

    @pytest.mark.parametrize("text", ['[{"a": 1}, {"b": ', '[{"a": 1}', '{"a": 1} {"a"', '[{"a": 1} ?'])
    def test_a_list_cut_short(self, tmp_path, text):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"a\.json cannot be read as JSON: entry 1"):
            list(entries(tmp_path / "a.json"))

    def test_entries_that_are_no_objects(self, tmp_path):
        (tmp_path / "a.json").write_text('["anime", "photo"]')
        with pytest.raises(UserError, match="entry 0 is no object"):
            list(entries(tmp_path / "a.json"))
