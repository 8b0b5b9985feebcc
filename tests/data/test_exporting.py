"""Exports: what the source of the same kind reads back is what was there, byte for byte where it is images."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from support.commands import fails
from support.datasets import encoded, jpeg, make_images, noise, truncated_jpeg, write_rows, write_trl

from diffpref.__main__ import main
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.exporting import TarWriter, export_dataset
from diffpref.data.importing import ImportOptions, import_source
from diffpref.data.schema import PairRow, exchanged
from diffpref.errors import UserError

LONG = "שלום\n" * 20_000


def make_pairs(count: int) -> list[PairRow]:
    pairs = [
        PairRow(
            id=f"pair-{number}",
            prompt=f'a "cat", number\t{number}',
            chosen=jpeg(2 * number),
            rejected=encoded(noise(2 * number + 1), ("PNG", "WEBP", "GIF", "BMP", "TIFF")[number % 5]),
            chosen_prompt=None if number % 3 else "of the chosen",
            label=(1.0, 0.75, 1.0, 0.875)[number % 4],
            margin=0.1 * number,
            chosen_model="m",
            source="somewhere",
            group_id=str(number // 2),
            scores={"chosen_score_hps": 0.3 * number, "rejected_score_hps": None if number == 1 else 1 / 3},
        )
        for number in range(count)
    ]
    pairs[1] = replace(pairs[1], prompt=LONG, rejected_id="x", annotator_id="7", weight=2.0)
    return pairs


def round_trip(tmp_path: Path, form: str, rows: list, **options) -> list:
    """The rows after an export and an import of the same kind."""
    dataset = PreferenceDataset.open(write_rows(tmp_path / "data", rows))
    summary = export_dataset(dataset, tmp_path / form, form, **options)
    assert (summary.read, summary.kept) == (len(rows), len(rows))
    again = import_source(form, tmp_path / form, tmp_path / "again")
    assert (again.kept, again.dropped) == (len(rows), {})
    return list(PreferenceDataset.open(tmp_path / "again").rows())


@pytest.mark.parametrize("form", ["trl", "folder", "webdataset"])
def test_pairs_come_back_as_they_were(tmp_path, form):
    rows = make_pairs(12)
    assert round_trip(tmp_path, form, rows) == rows


@pytest.mark.parametrize("form", ["folder", "webdataset"])
def test_single_images_come_back_as_they_were(tmp_path, form):
    labels = [None, 1.0, 0.0, 0.5]
    scores = [{"score_hps": 0.1}, {"score_hps": None}, {"score_hps": -3.0}, {"score_hps": 1e-30}]
    rows = make_images(4, label=labels, scores=scores, image_prompt=["a", None, None, "ä"], source=["s"] * 4)
    assert round_trip(tmp_path, form, rows) == rows


@pytest.mark.parametrize("form", ["folder", "webdataset"])
def test_ties_and_turned_labels_are_kept(tmp_path, form):
    rows = [replace(row, label=label) for row, label in zip(make_pairs(3), (0.5, 0.25, 0.0), strict=True)]
    assert round_trip(tmp_path, form, rows) == rows


def test_trl_has_the_likelier_winner_first_and_no_ties(tmp_path):
    rows = [replace(row, label=label) for row, label in zip(make_pairs(4), (1.0, 0.25, 0.5, 0.0), strict=True)]
    dataset = PreferenceDataset.open(write_rows(tmp_path / "data", rows))
    summary = export_dataset(dataset, tmp_path / "trl", "trl")
    assert (summary.read, summary.kept, summary.ties, summary.dropped) == (4, 3, 1, {"tie": 1})
    import_source("trl", tmp_path / "trl", tmp_path / "again")
    first, second, third = PreferenceDataset.open(tmp_path / "again").rows()
    assert first == rows[0]
    assert (second.chosen, second.rejected, second.label) == (rows[1].rejected, rows[1].chosen, 0.75)
    assert (second.chosen_id, second.rejected_model, second.chosen_model) == ("x", "m", None)
    assert second.scores == {"chosen_score_hps": None, "rejected_score_hps": 0.3}
    assert (third.id, third.chosen, third.label) == ("pair-3", rows[3].rejected, 1.0)


def test_exchanging_twice_is_nothing():
    for row in make_pairs(4):
        assert exchanged(exchanged(row)) == row
        assert exchanged(row).chosen == row.rejected


def test_trl_has_its_three_columns_and_what_holds_anything(tmp_path):
    write_trl(tmp_path / "data" / "train.parquet", [("p", jpeg(0), jpeg(1))])
    export_dataset(PreferenceDataset.open(tmp_path / "data"), tmp_path / "plain", "trl")
    assert pq.read_schema(tmp_path / "plain" / "train-00000.parquet").names == ["prompt", "chosen", "rejected", "id"]
    export_dataset(PreferenceDataset.open(write_rows(tmp_path / "more", make_pairs(3))), tmp_path / "trl", "trl")
    names = pq.read_schema(tmp_path / "trl" / "train-00000.parquet").names
    assert names[:4] == ["prompt", "chosen", "rejected", "id"]
    assert "rejected_prompt" in names  # the chosen ones have some
    assert set(names) >= {"label", "margin", "weight", "rejected_score_hps"}
    assert "rejected_model" in names
    assert "image" not in names


def test_datasets_opens_each_form(tmp_path):
    rows = [replace(row, rejected=encoded(noise(number))) for number, row in enumerate(make_pairs(3))]
    dataset = PreferenceDataset.open(write_rows(tmp_path / "data", rows))  # it wants one format of images in tars
    for form in ("trl", "folder", "webdataset"):
        export_dataset(dataset, tmp_path / form, form)
    cache = str(tmp_path / "cache")
    trl = datasets.load_dataset(str(tmp_path / "trl"), split="train", cache_dir=cache)
    assert trl[2]["chosen"].size == (24, 16)
    folder = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "folder"), split="train", cache_dir=cache)
    assert folder[2]["rejected"].size == (24, 16)
    assert folder[0]["prompt"] == 'a "cat", number\t0'
    tars = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "webdataset" / "*.tar"), split="train", cache_dir=cache, streaming=True
    )
    assert next(iter(tars))["json"]["prompt"] == 'a "cat", number\t0'
    assert next(iter(tars))["rejected.png"].size == (24, 16)


def test_files_hold_the_original_bytes(tmp_path):
    rows = make_pairs(5)
    dataset = PreferenceDataset.open(write_rows(tmp_path / "data", rows))
    export_dataset(dataset, tmp_path / "folder", "folder")
    lines = [json.loads(line) for line in (tmp_path / "folder" / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert lines[3]["chosen_file_name"] == "images/00000/00000003-chosen.jpg"
    assert [Path(line["rejected_file_name"]).suffix for line in lines] == [".png", ".webp", ".gif", ".bmp", ".tiff"]
    for line, row in zip(lines, rows, strict=True):
        assert (tmp_path / "folder" / line["rejected_file_name"]).read_bytes() == row.rejected
    export_dataset(dataset, tmp_path / "tars", "webdataset")
    with tarfile.open(tmp_path / "tars" / "train-00000.tar") as tar:
        assert tar.getnames()[3:6] == ["00000001.chosen.jpg", "00000001.rejected.webp", "00000001.json"]
        assert tar.extractfile("00000004.rejected.tiff").read() == rows[4].rejected


def test_many_rows_are_spread_over_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("diffpref.data.exporting.FILES_A_FOLDER", 2)
    assert round_trip(tmp_path, "folder", make_pairs(5)) == make_pairs(5)
    assert sorted(path.name for path in (tmp_path / "folder" / "images").iterdir()) == ["00000", "00001", "00002"]


def test_shards_have_a_size_and_bytes_that_depend_on_the_rows_alone(tmp_path):
    rows = make_pairs(9)
    size = 2 * sum(len(row.chosen) + len(row.rejected) for row in rows) // 9
    assert round_trip(tmp_path, "webdataset", rows, shard_bytes=size) == rows
    export_dataset(PreferenceDataset.open(tmp_path / "data"), tmp_path / "other", "webdataset", shard_bytes=size)
    files = sorted(path.name for path in (tmp_path / "webdataset").glob("*.tar"))
    assert 3 <= len(files) <= 5
    assert files[:2] == ["train-00000.tar", "train-00001.tar"]
    for name in files:
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "webdataset" / name).read_bytes()


@pytest.mark.parametrize("form", ["trl", "folder", "webdataset"])
def test_broken_images_are_counted_and_too_many_stop(tmp_path, form):
    pairs = [(f"p{number}", jpeg(2 * number), jpeg(2 * number + 1)) for number in range(40)]
    pairs[7] = ("p7", jpeg(14), truncated_jpeg())
    pairs[9] = ("p9", b"", jpeg(19))
    write_trl(tmp_path / "data" / "train.parquet", pairs)
    summary = export_dataset(PreferenceDataset.open(tmp_path / "data"), tmp_path / "out", form)
    assert (summary.read, summary.kept, summary.dropped) == (40, 38, {"image_truncated": 1, "image_empty": 1})
    assert [row.row for row in summary.bad_rows] == [7, 9]
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (described["source"], described["options"]["form"]) == ("export", form)
    pairs[11] = ("p11", b"", jpeg(1))
    write_trl(tmp_path / "data" / "train.parquet", pairs)
    with pytest.raises(UserError, match="over 5% of 40 rows are bad"):
        export_dataset(PreferenceDataset.open(tmp_path / "data"), tmp_path / "other", form)
    assert not (tmp_path / "other").exists()


def test_an_export_stands_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "data", make_pairs(6))
    output = tmp_path / "out"
    export_dataset(PreferenceDataset.open(data), output, "webdataset")
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    arguments = ["data", "export", "webdataset", str(data), str(output)]
    assert "exists and is not empty" in fails(capsys, [*arguments, "--shard-mb", "1"])

    def full(self, row):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TarWriter, "write", full)
        assert main([*arguments, "--overwrite"]) == 2
        assert capsys.readouterr().err.endswith(f"cannot write {output}: No space left on device\n")
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert main([*arguments, "--overwrite", "--shard-mb", "0.001"]) == 0
    assert len(list(output.glob("*.tar"))) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_the_command_counts(tmp_path, capsys):
    rows = [replace(row, label=label) for row, label in zip(make_pairs(2), (1.0, 0.5), strict=True)]
    data = write_rows(tmp_path / "data", rows, "test")
    assert main(["data", "export", "trl", str(data), str(tmp_path / "a"), "--split", "test"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}: 1 pairs of 2\n  dropped        1  tie\n"
    assert (tmp_path / "a" / "test-00000.parquet").exists()
    assert main(["data", "export", "folder", str(data), str(tmp_path / "b"), "--split", "test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "b" / "dataset.json").read_text())


def test_what_is_refused(tmp_path, capsys):
    data = write_rows(tmp_path / "data", make_images(2))
    arguments = ["data", "export", "trl", str(data), str(tmp_path / "out")]
    assert "holds single images, and TRL's form is of pairs" in fails(capsys, arguments)
    arguments[2] = "folder"
    assert "a folder of image files has no shards" in fails(capsys, [*arguments, "--shard-mb", "5"])
    assert "would replace the input" in fails(capsys, [*arguments[:4], str(data), "--overwrite"])
    arguments[2] = "webdataset"
    assert "--shard-mb: 0 is not between" in fails(capsys, [*arguments, "--shard-mb", "0"])
    arguments[2] = "csv"
    assert "csv" in fails(capsys, arguments)
    assert not (tmp_path / "out").exists()


def test_numbers_that_json_does_not_have(tmp_path):
    rows = [replace(row, margin=float("inf"), scores={}) for row in make_pairs(2)]
    found = round_trip(tmp_path, "webdataset", rows)
    assert [row.margin for row in found] == [None, None]


def test_all_ties_leave_nothing_for_trl(tmp_path):
    rows = [replace(row, label=0.5) for row in make_pairs(2)]
    dataset = PreferenceDataset.open(write_rows(tmp_path / "data", rows))
    with pytest.raises(UserError, match=r"no row of .* is left: 2 tie"):
        export_dataset(dataset, tmp_path / "out", "trl")
    assert not (tmp_path / "out").exists()


def test_a_tar_of_another_split_is_imported_as_that_split(tmp_path):
    dataset = PreferenceDataset.open(write_rows(tmp_path / "data", make_pairs(2), "test"), "test")
    export_dataset(dataset, tmp_path / "tars", "webdataset")
    import_source("webdataset", tmp_path / "tars", tmp_path / "again", ImportOptions(split="test"))
    assert list(PreferenceDataset.open(tmp_path / "again", "test").rows()) == make_pairs(2)
