"""What an import leaves out and why: ties, filters, duplicates, splits by prompt, and the published rules."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import fails
from support.datasets import PICKAPIC, encoded, jpeg, noise, pickapic_row, write_pickapic

from diffpref.__main__ import main
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.import_options import ImportOptions
from diffpref.data.importing import import_source
from diffpref.data.splitting import split_of_prompt
from diffpref.data.writing import ShardWriter
from diffpref.draws import draw_seed, uniform
from diffpref.errors import UserError

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def written(folder: Path, split: str = "train") -> list[dict]:
    return [row for file in sorted(folder.glob(f"{split}-*.parquet")) for row in pq.read_table(file).to_pylist()]


def sides(row: dict) -> tuple[str, bytes, bytes]:
    return row["prompt"], row["chosen"]["bytes"], row["rejected"]["bytes"]


@pytest.fixture
def imported(tmp_path):
    """Import rows with options; the summary and the folder."""

    def run(rows: list[dict], **options):
        file = write_pickapic(tmp_path / "in" / "train.parquet", rows)
        return import_source("pickapic", file, tmp_path / "out", ImportOptions(**options)), tmp_path / "out"

    return run


class TestTies:
    def test_soft_is_another_name_for_keep(self, imported):
        summary, folder = imported([pickapic_row(0, label_0=0.5)], ties="soft")
        assert written(folder)[0]["label"] == 0.5
        assert summary.options["ties"] == "keep"

    def test_the_first_image_wins(self, imported):
        summary, folder = imported([pickapic_row(0, label_0=0.5), pickapic_row(1, label_0=0.0)], ties="first")
        assert [sides(row)[1] for row in written(folder)] == [jpeg(0), jpeg(3)]
        assert [row["label"] for row in written(folder)] == [1.0, 1.0]
        assert (summary.ties, summary.options["ties"]) == (1, "first")


class TestFilters:
    ROWS = tuple(
        pickapic_row(n, model_0=a, model_1=b)
        for n, (a, b) in enumerate([("dreamlike-v1", "dreamlike-v2"), ("dreamlike-v1", "sdxl"), (None, "dreamlike-v1")])
    )

    def test_generator(self, imported):
        summary, folder = imported(list(self.ROWS), generator="dreamlike")
        assert [row["prompt"] for row in written(folder)] == ["caption 0"]
        assert summary.dropped == {"other_generator": 2}
        assert summary.options["generator"] == "dreamlike"

    def test_an_unknown_generator_is_named_with_the_nearest(self, imported):
        with pytest.raises(UserError, match=r"--generator: .* contain 'dreamlke': did you mean 'dreamlike-v\d'\?"):
            imported(list(self.ROWS), generator="dreamlke")

    def test_without_names_of_generators(self, imported):
        with pytest.raises(UserError, match="it names no generators"):
            imported([pickapic_row(0, model_0=None, model_1=None)], generator="dream")

    def test_images_of_rows_that_a_filter_leaves_out_are_not_judged(self, imported):
        rows = [pickapic_row(n, model_0="other", jpg_0=b"broken") for n in range(5)] + [pickapic_row(5)]
        summary, _ = imported(rows, generator="model")
        assert summary.dropped == {"other_generator": 5}

    def test_agreement_that_the_source_does_not_tell(self, imported):
        with pytest.raises(UserError, match=r"is left; of 1 rows were dropped: no_agreement 1"):
            imported([pickapic_row(0)], min_agreement=0.5)

    @pytest.mark.parametrize(("least", "kept"), [(16, 3), (17, 1), (40, 1)])
    def test_the_least_side_in_pixels(self, imported, least, kept):
        large = encoded(noise(0, 64, 40))
        rows = [
            pickapic_row(0),
            pickapic_row(1, jpg_0=large),
            pickapic_row(2, jpg_0=large, jpg_1=encoded(noise(1, 40, 64))),
        ]
        summary, folder = imported(rows, min_side=least)
        assert len(written(folder)) == kept
        assert summary.dropped == ({"small_image": 3 - kept} if kept < 3 else {})
        assert summary.options["min_side"] == least


class TestDuplicates:
    def test_the_same_prompt_and_images_whoever_won(self, imported):
        first = pickapic_row(0)
        turned = first | {"jpg_0": first["jpg_1"], "jpg_1": first["jpg_0"], "image_0_uid": "x"}
        other_prompt = first | {"caption": "another"}
        other_image = first | {"jpg_1": jpeg(50)}
        rows = [first, first | {"label_0": 0.0}, turned, other_prompt, other_image, first]
        summary, folder = imported(rows, dedup=True)
        assert [row["id"] for row in written(folder)] == ["train-0", "train-3", "train-4"]
        assert summary.dropped == {"duplicate_pair": 3}
        assert summary.options["dedup"] is True

    def test_a_dropped_row_is_no_first_one(self, imported):
        rows = [pickapic_row(0, label_0=0.5), pickapic_row(0)]
        summary, folder = imported(rows, dedup=True, ties="drop")
        assert summary.dropped == {"tie": 1}
        assert len(written(folder)) == 1

    def test_without_the_option_all_stay(self, imported):
        assert imported([pickapic_row(0), pickapic_row(0)])[0].kept == 2

    def test_an_id_stands_once(self, imported, monkeypatch):
        from diffpref.data.sources import pickapic

        reading = pickapic.read_from
        repeated = lambda *given: [found for found in reading(*given) for _ in range(2)]  # noqa: E731
        monkeypatch.setattr(pickapic, "read_from", lambda *given: iter(repeated(*given)))
        summary, folder = imported([pickapic_row(n) for n in range(3)], max_bad_share=1)
        assert [row["id"] for row in written(folder)] == ["train-0", "train-1", "train-2"]
        assert summary.dropped == {"duplicate_id": 3}
        assert summary.bad_rows[0].detail == "train-0"


class TestSplits:
    ROWS = tuple(pickapic_row(n, caption=f"caption {n % 60}") for n in range(150))

    def test_no_prompt_stands_in_two_splits_and_nothing_is_lost(self, imported):
        summary, folder = imported(list(self.ROWS), splits=SHARES)
        prompts = {split: [row["prompt"] for row in written(folder, split)] for split in SHARES}
        assert sum(map(len, prompts.values())) == 150
        assert summary.splits == {split: len(found) for split, found in prompts.items()}
        sets = list(map(set, prompts.values()))
        assert not sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]
        assert summary.options["splits"] == "train=0.8,validation=0.1,test=0.1"
        assert all(len(PreferenceDataset.open(folder, split)) == count for split, count in summary.splits.items())

    def test_the_split_depends_on_the_prompt_alone(self, imported, tmp_path):
        _, folder = imported(list(self.ROWS), splits=SHARES)
        where = {row["prompt"]: split for split in SHARES for row in written(folder, split)}
        for prompt, split in where.items():  # the hash of `data.holdout`, for another purpose
            place = uniform(draw_seed(prompt), "split")
            assert split == ("train" if place < 0.8 else "validation" if place < 0.9 else "test")
        file = write_pickapic(tmp_path / "half.parquet", list(self.ROWS)[100:])
        import_source("pickapic", file, tmp_path / "half", ImportOptions(splits=SHARES))
        assert all(where[row["prompt"]] == split for split in SHARES for row in written(tmp_path / "half", split))

    def test_shares_are_kept_on_average(self):
        found = [split_of_prompt(f"prompt {n}", SHARES) for n in range(4000)]
        assert found.count("train") / 4000 == pytest.approx(0.8, abs=0.02)
        assert found.count("test") / 4000 == pytest.approx(0.1, abs=0.015)

    def test_a_split_is_no_held_out_part(self):
        held = [n for n in range(4000) if uniform(draw_seed(f"prompt {n}"), "holdout") < 0.1]
        assert sum(split_of_prompt(f"prompt {n}", SHARES) == "train" for n in held) / len(held) == pytest.approx(
            0.8, abs=0.06
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("train", "is not NAME=SHARE"),
            ("train=much", "is not NAME=SHARE"),
            ("train=0.5,test=0.4", "must add up to 1, not 0.9"),
            ("train=1.5,test=-0.5", "must be above 0, not -0.5"),
            ("train=nan", "must be above 0"),
            ("train=0.5,train=0.5", "twice"),
            ("../up=1", "is no name for a split"),
        ],
    )
    def test_shares_that_will_not_do(self, tmp_path, capsys, text, message):
        line = fails(capsys, ["data", "import", "pickapic", "in", str(tmp_path / "out"), "--splits", text])
        assert message in line

    def test_from_the_command_line(self, tmp_path, capsys):
        file = write_pickapic(tmp_path / "in.parquet", list(self.ROWS))
        command = ["data", "import", "pickapic", str(file), str(tmp_path / "out"), "--splits", "train=0.5,test=0.5"]
        assert main(command) == 0
        out = capsys.readouterr().out
        assert [line.split()[0] for line in out.splitlines()[1:]] == ["split", "split"]
        told = json.loads((tmp_path / "out" / "dataset.json").read_text())
        assert sum(told["splits"].values()) == told["kept"] == 150

    def test_a_lost_shard_of_a_split_is_noticed(self, imported):
        _, folder = imported(list(self.ROWS), splits=SHARES, shard_rows=50)
        (folder / "train-00001.parquet").unlink()
        with pytest.raises(UserError, match=r"but its dataset\.json tells"):
            PreferenceDataset.open(folder, "train")
        PreferenceDataset.open(folder, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": "dro", "ties": "drop"}, "--rules dro already says what becomes of ties"),
        ({"min_agreement": 1.5}, "--min-agreement must lie between 0 and 1"),
        ({"min_side": -1}, "--min-side"),
        ({"min_margin": -1.0}, "--min-margin"),
        ({"shard_rows": 0}, "--shard-rows"),
    ],
)
def test_values_that_will_not_do(options, message):
    with pytest.raises(UserError, match=message):
        ImportOptions(**options).check()


class TestPublishedRules:
    """Each against a computation of a few lines on the rows themselves."""

    @pytest.fixture
    def rows(self):
        rng = np.random.default_rng(0)
        models = ["dreamlike-photoreal-2.0", "stable-diffusion-xl-0.8", "dreamlike-diffusion-1.0"]
        rows = []
        for n in range(120):
            changes = {
                "label_0": float(rng.choice([0.0, 0.5, 1.0])),
                "model_0": str(rng.choice(models)),
                "model_1": str(rng.choice(models)),
                "caption": f"caption {rng.integers(15)}",
                "jpg_0": jpeg(int(rng.integers(12))),
                "jpg_1": jpeg(int(rng.integers(12))),
            }
            rows.append(pickapic_row(n, **changes))
        return rows

    def test_the_rows_have_what_the_rules_are_about(self, rows):
        assert {row["label_0"] for row in rows} == {0.0, 0.5, 1.0}
        pairs = [(row["caption"], row["jpg_0"]) for row in rows]
        assert len(set(pairs)) < len(pairs)

    def test_diffusion_dpo_leaves_out_ties(self, imported, rows):
        summary, folder = imported(rows, rules="diffusion-dpo")
        expected = []
        for row in rows:
            if row["label_0"] in (0, 1):
                better = 0 if row["label_0"] == 1 else 1
                expected.append((row["caption"], row[f"jpg_{better}"], row[f"jpg_{1 - better}"]))
        assert list(map(sides, written(folder))) == expected
        assert summary.options["rules"] == "diffusion-dpo"

    def test_diffusion_dpo_with_dreamlike_pairs_only(self, imported, rows):
        _, folder = imported(rows, rules="diffusion-dpo", generator="dream")
        expected = []
        for row in rows:
            if row["label_0"] in (0, 1) and "dream" in row["model_0"] and "dream" in row["model_1"]:
                better = 0 if row["label_0"] == 1 else 1
                expected.append((row["caption"], row[f"jpg_{better}"], row[f"jpg_{1 - better}"]))
        assert 5 < len(expected) < 60
        assert list(map(sides, written(folder))) == expected

    def test_diffengine_lets_image_0_win_ties(self, imported, rows):
        _, folder = imported(rows, rules="diffengine")
        expected = []
        for row in rows:
            first, second = (row["jpg_0"], row["jpg_1"]) if row["label_0"] else (row["jpg_1"], row["jpg_0"])
            expected.append((row["caption"], first, second))
        assert list(map(sides, written(folder))) == expected
        assert {row["label"] for row in written(folder)} == {1.0}

    def captioned(self, folder: Path, rows: list[dict], **changes) -> Path:
        table = pa.Table.from_pylist(rows, PICKAPIC)
        for side in (0, 1):
            captions = [changes.get(f"{side}-{n}", f"caption of {n}, {side}") for n in range(len(rows))]
            table = table.append_column(f"caption_{side}", pa.array(captions, pa.string()))
        pq.write_table(table, folder / "captioned.parquet")
        return folder / "captioned.parquet"

    def test_dcpo_takes_both_captions_with_their_images_and_leaves_out_nothing(self, rows, tmp_path):
        file = self.captioned(tmp_path, rows)
        import_source("pickapic", file, tmp_path / "out", ImportOptions(rules="dcpo"))
        expected = []
        for n, row in enumerate(rows):
            better = 1 if row["label_0"] == 0 else 0
            images = (row[f"jpg_{better}"], row[f"jpg_{1 - better}"])
            expected.append((*images, f"caption of {n}, {better}", f"caption of {n}, {1 - better}"))
        found = [(*sides(row)[1:], row["chosen_prompt"], row["rejected_prompt"]) for row in written(tmp_path / "out")]
        assert found == expected

    def test_dcpo_needs_the_captions(self, imported, rows, tmp_path):
        with pytest.raises(UserError, match="most often no_caption"):
            imported(rows, rules="dcpo")
        file = self.captioned(tmp_path, rows, **{"1-7": None, "0-9": " "})
        summary = import_source("pickapic", file, tmp_path / "captioned", ImportOptions(rules="dcpo"))
        assert summary.dropped == {"no_caption": 2}
        assert summary.bad_rows[0].row == 7

    def test_dro_takes_every_image_once_with_a_prompt_and_the_best_of_all(self, imported, rows, tmp_path):
        summary, folder = imported(rows, rules="dro")
        unique = dict.fromkeys((row[f"jpg_{side}"], row["caption"]) for row in rows for side in (0, 1))
        found = [(row["image"]["bytes"], row["prompt"]) for row in written(folder)]
        assert found == list(unique)
        assert {row["label"] for row in written(folder)} == {None}
        assert summary.format == "diffpref-images-1"
        assert summary.dropped == {"duplicate_image": 2 * len(rows) - len(unique)}

        scores = dict(zip(unique, np.random.default_rng(1).permutation(len(unique)).astype(float), strict=True))
        with ShardWriter(self.made(tmp_path / "scored"), "train", kind="images", scores=["score_hps"]) as shards:
            for row in PreferenceDataset.open(folder).rows():
                row.scores["score_hps"] = scores[row.image, row.prompt]  # type: ignore[union-attr]
                shards.write(row)
        select = ["data", "select", str(tmp_path / "scored"), str(tmp_path / "best"), "--scorer", "hps", "--top", "20"]
        assert main(select) == 0
        best = sorted(unique, key=lambda each: -scores[each])[:20]
        assert {(row["image"]["bytes"], row["prompt"]) for row in written(tmp_path / "best")} == set(best)
        assert len(written(tmp_path / "best")) == 20

    def made(self, folder: Path) -> Path:
        folder.mkdir()
        return folder

    def test_dro_begins_with_image_0_whoever_won(self, imported):
        _, folder = imported([pickapic_row(0, label_0=0.0)], rules="dro")
        assert [row["image"]["bytes"] for row in written(folder)] == [jpeg(0), jpeg(1)]
        assert [row["image_id"] for row in written(folder)] == ["a0", "b0"]

    def test_rules_are_about_pairs(self, tmp_path, capsys):
        line = fails(capsys, ["data", "import", "dro", str(tmp_path), str(tmp_path / "out"), "--rules", "dro"])
        assert line == "--rules dro is about pairs, and dro holds single images"
