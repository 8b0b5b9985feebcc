import json
import os
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from support.datasets import bomb, encoded, jpeg, noise, pickapic_row, pickapic_rows, write_pickapic

from diffpref import __version__
from diffpref.__main__ import main
from diffpref.data import images, writing
from diffpref.data.import_options import ImportOptions
from diffpref.data.importing import find_source, import_source
from diffpref.data.judging import broken_tie
from diffpref.data.schema import PairRow
from diffpref.data.sources import pickapic
from diffpref.data.writing import ShardWriter
from diffpref.errors import UserError


@pytest.fixture
def source(tmp_path):
    """Write rows as a Pick-a-Pic file, and give its path."""
    return lambda rows, **options: write_pickapic(tmp_path / "in" / "pairs.parquet", rows, **options)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "pairs"


def written(output: Path) -> list[dict]:
    return [row for file in sorted(output.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def refused(capsys, *arguments: object) -> str:
    """Run `data import pickapic` with the arguments; the one line that it prints, after exit code 2."""
    assert main(["data", "import", "pickapic", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    *progress, line = err.splitlines()
    assert out == ""
    assert all(note.startswith("import pickapic: ") for note in progress)
    return line.removeprefix("diffpref: ")


def assert_nothing_at(output: Path) -> None:
    assert not output.exists()
    assert not output.parent.exists() or list(output.parent.iterdir()) == []


def test_bytes_are_kept_exactly_and_nothing_is_missing(source, output):
    rows = [
        pickapic_row(0, label_0=0.0),
        pickapic_row(1, jpg_0=encoded(noise(5), "WEBP")),
        pickapic_row(2, label_0=0.5),
    ]
    summary = import_source("pickapic", source(rows), output)
    found = written(output)
    assert [row["id"] for row in found] == ["pairs-0", "pairs-1", "pairs-2"]
    assert [row["chosen"]["bytes"] for row in found] == [jpeg(1), encoded(noise(5), "WEBP"), jpeg(4)]
    assert [row["rejected"]["bytes"] for row in found] == [jpeg(0), jpeg(3), jpeg(5)]
    assert [row["label"] for row in found] == [1.0, 1.0, 0.5]
    assert [row["annotator_id"] for row in found] == ["7", "7", "7"]
    assert found[0]["chosen_prompt"] is None
    assert (summary.read, summary.kept, summary.ties, summary.dropped) == (3, 3, 1, {})
    assert sorted(file.name for file in output.iterdir()) == ["dataset.json", "train-00000.parquet"]
    assert [file.name for file in output.parent.iterdir()] == ["pairs"]


@pytest.mark.parametrize("split", ["train", "validation", "held_out", "test_unique"])
def test_datasets_opens_the_output_with_image_features(source, output, split, tmp_path):
    import_source("pickapic", source(pickapic_rows(3)), output, ImportOptions(split=split))
    files = {split: str(output / f"{split}-*.parquet")}
    cache = str(tmp_path / "cache")
    loaded = [datasets.load_dataset("parquet", data_files=files, cache_dir=cache)[split]]
    if split in ("train", "validation"):  # the names that the library finds by itself
        loaded.append(datasets.load_dataset(str(output), cache_dir=cache)[split])
    for dataset in loaded:
        assert dataset.features["chosen"] == datasets.Image()
        assert dataset.features["rejected"] == datasets.Image()
        assert dataset.features["label"] == datasets.Value("float64")
        assert dataset[1]["chosen"].size == (24, 16)
        assert dataset.cast_column("chosen", datasets.Image(decode=False))[1]["chosen"]["bytes"] == jpeg(2)


def test_dataset_json_counts_everything(source, output):
    rows = pickapic_rows(80, no_label=14, tie=3, null_caption=1, truncated=2)
    import_source("pickapic", source(rows), output, ImportOptions(ties="drop"))
    described = json.loads((output / "dataset.json").read_text())
    assert described["format"] == "diffpref-pairs-1"
    assert described["diffpref_version"] == __version__
    assert (described["source"], described["split"]) == ("pickapic", "train")
    assert described["input"].endswith("pairs.parquet")
    assert described["options"] == {"ties": "drop", "max_bad_share": 0.05}
    assert (described["read"], described["kept"], described["ties"]) == (100, 80, 3)
    assert described["dropped"] == {"no_label": 14, "tie": 3, "image_truncated": 2, "null_caption": 1}
    first, *others = described["bad_rows"]
    assert first == {"file": "pairs.parquet", "row": 97, "reason": "null_caption", "detail": "", "bad": True}
    assert [(row["row"], row["reason"]) for row in others] == [(98, "image_truncated"), (99, "image_truncated")]
    assert others[0]["detail"].startswith("the rejected image: ")
    assert len(written(output)) == 80


@pytest.mark.parametrize(
    ("data", "reason"),
    [(bomb(), "image_too_large"), (b"", "image_empty"), (None, "image_empty"), (b"hello", "image_not_an_image")],
)
def test_bad_images_are_dropped_by_reason(source, output, data, reason):
    rows = pickapic_rows(20)
    rows[7]["jpg_0"] = data
    summary = import_source("pickapic", source(rows), output)
    assert summary.dropped == {reason: 1}
    assert summary.bad_rows[0].row == 7
    assert [row["prompt"] for row in written(output)] == [f"caption {n}" for n in range(20) if n != 7]


def test_odd_but_good_images_are_kept_as_they_are(source, output):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    odd = [
        encoded(Image.new("CMYK", (8, 8)), "JPEG"),
        encoded(Image.new("RGBA", (8, 8)), "PNG"),
        encoded(noise(0), "JPEG", exif=exif),
        encoded(noise(0), "GIF", save_all=True, append_images=[noise(1)]),
    ]
    import_source("pickapic", source([pickapic_row(n, jpg_0=data) for n, data in enumerate(odd)]), output)
    assert [row["chosen"]["bytes"] for row in written(output)] == odd


def test_five_bad_in_a_hundred_pass_and_six_stop(source, output, capsys):
    file = source(pickapic_rows(95, truncated=3, null_caption=2))
    assert main(["data", "import", "pickapic", str(file), str(output)]) == 0
    capsys.readouterr()
    assert len(written(output)) == 95
    other = output.parent.parent / "other" / "pairs"
    line = refused(capsys, source(pickapic_rows(94, truncated=4, null_caption=2)), other)
    assert line.startswith(
        "more than 0.05 of 100 rows are bad: 6 after reading 100, most often image_truncated (4); "
        "the first: pairs.parquet row 94: image_truncated (the rejected image: "
    )
    assert not other.parent.exists()


def test_rows_never_judged_do_not_dilute_the_bad_share(source, output):
    with pytest.raises(UserError, match=r"more than 0\.05 of 20 rows are bad: 2 after reading 100"):
        import_source("pickapic", source(pickapic_rows(18, null_caption=2, no_label=80)), output)
    assert_nothing_at(output)


def test_no_more_bad_rows_than_a_limit_are_named(source, output, monkeypatch):
    monkeypatch.setattr("diffpref.data.tally.NAMED_ROWS", 20)
    summary = import_source(
        "pickapic", source(pickapic_rows(30, null_caption=25)), output, ImportOptions(max_bad_share=1)
    )
    assert summary.dropped == {"null_caption": 25}
    assert [row.row for row in summary.bad_rows] == list(range(30, 50))


def test_ties_count_as_judged_rows(source, output):
    summary = import_source("pickapic", source(pickapic_rows(5, tie=14, null_caption=1)), output)
    assert (summary.kept, summary.ties, summary.dropped) == (19, 14, {"null_caption": 1})


def test_too_many_bad_rows_stop_early(source, output, monkeypatch):
    rows = pickapic_rows(0, null_caption=6) + [pickapic_row(n) for n in range(94)]
    with pytest.raises(UserError, match="6 after reading 6"):
        import_source("pickapic", source(rows), output)
    assert_nothing_at(output)


def test_max_bad_share_is_an_option(source, output, capsys):
    file = source(pickapic_rows(1, null_caption=1))
    line = refused(capsys, file, output, "--max-bad-share", "0.49")
    assert "more than 0.49 of 2 rows are bad: 1" in line
    assert main(["data", "import", "pickapic", str(file), str(output), "--max-bad-share", "0.5"]) == 0
    capsys.readouterr()
    assert "must lie between 0 and 1" in refused(capsys, file, output.with_name("b"), "--max-bad-share", "1.5")


def test_ties_dropped(source, output):
    summary = import_source("pickapic", source(pickapic_rows(2, tie=3)), output, ImportOptions(ties="drop"))
    assert (summary.kept, summary.ties, summary.dropped) == (2, 3, {"tie": 3})
    assert [row["label"] for row in written(output)] == [1.0, 1.0]


def test_ties_broken_at_random_and_always_alike(source, output):
    rows = [pickapic_row(n, label_0=0.5) for n in range(64)]
    import_source("pickapic", source(rows), output, ImportOptions(ties="random"))
    found = written(output)
    first_wins = [row["chosen"]["bytes"] == jpeg(2 * n) for n, row in enumerate(found)]
    assert {row["label"] for row in found} == {1.0}
    assert 16 < sum(first_wins) < 48
    assert all(row["chosen_id"] == (f"a{n}" if first_wins[n] else f"b{n}") for n, row in enumerate(found))
    again = output.with_name("again")
    import_source("pickapic", source(rows), again, ImportOptions(ties="random"))
    assert written(again) == found


def test_a_broken_tie_exchanges_captions_too():
    pairs = [PairRow(str(n), "p", b"a", b"b", "of a", "of b", label=0.5) for n in range(20)]
    assert {(pair.chosen, pair.chosen_prompt, pair.label) for pair in map(broken_tie, pairs)} == {
        (b"a", "of a", 1.0),
        (b"b", "of b", 1.0),
    }


def test_all_ties_are_imported_with_a_warning(source, output, capsys):
    assert main(["data", "import", "pickapic", str(source(pickapic_rows(0, tie=4))), str(output)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{output}: kept 4 of 4 rows, 4 ties (keep)\n"
    assert f"diffpref: warning: every pair in {output} is a tie" in err
    assert len(written(output)) == 4


def test_no_warning_when_one_pair_is_no_tie(source, output, capsys):
    import_source("pickapic", source(pickapic_rows(1, tie=4)), output)
    assert "warning" not in capsys.readouterr().err


def test_nothing_kept_is_refused(source, output, capsys):
    line = refused(capsys, source(pickapic_rows(0, tie=4, no_label=2)), output, "--ties", "drop")
    assert line.endswith("is left; of 6 rows were dropped: tie 4, no_label 2")
    assert_nothing_at(output)


def test_json_result(source, output, capsys):
    assert main(["data", "import", "pickapic", str(source(pickapic_rows(2))), str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((output / "dataset.json").read_text())


def test_empty_dataset(source, output, capsys):
    assert refused(capsys, source([]), output).endswith("pairs.parquet is empty: it holds no rows")
    assert_nothing_at(output)


@pytest.mark.parametrize("options", [{"drop": ("label_0",)}, {"rename": {"caption": "captoin"}}])
def test_wrong_columns_leave_nothing(source, output, capsys, options):
    assert "has no column" in refused(capsys, source(pickapic_rows(1), **options), output)
    assert_nothing_at(output)


def test_missing_input_empty_folder_and_broken_file(tmp_path, output, capsys):
    assert refused(capsys, tmp_path / "absent", output) == f"{tmp_path / 'absent'} does not exist"
    (tmp_path / "empty").mkdir()
    assert refused(capsys, tmp_path / "empty", output) == f"{tmp_path / 'empty'} holds no parquet, tar or JSON files"
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    assert "broken.parquet is not a readable parquet file: " in refused(capsys, tmp_path / "broken.parquet", output)
    assert_nothing_at(output)


def test_a_file_cut_in_half_among_whole_ones(source, output, capsys):
    file = source(pickapic_rows(40))
    half = file.with_name("pairs2.parquet")
    half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "pairs2.parquet is not a readable parquet file: " in refused(capsys, file.parent, output)
    assert_nothing_at(output)


def test_scores_of_a_source_are_written(source, output, monkeypatch):
    reading, column = pickapic.read_from, "chosen_score_hps"

    def scored(*given):
        for found in reading(*given):
            yield replace(found, record=replace(found.record, scores={column: 0.5}))

    monkeypatch.setattr(pickapic, "read_from", scored)
    monkeypatch.setattr(pickapic, "SCORES", (column,), raising=False)
    import_source("pickapic", source(pickapic_rows(2)), output)
    assert [row[column] for row in written(output)] == [0.5, 0.5]


def test_a_file_that_breaks_in_the_middle(source, output, capsys):
    file = source(pickapic_rows(40))
    data = bytearray(file.read_bytes())
    start = pq.ParquetFile(file).metadata.row_group(4).column(0).data_page_offset
    data[start : start + 200] = bytes(200)
    file.write_bytes(data)
    assert "pairs.parquet is not a readable parquet file: " in refused(capsys, file, output)
    assert_nothing_at(output)


def test_output_that_is_not_empty_is_left_alone(source, output, capsys):
    output.mkdir(parents=True)
    (output / "note.txt").write_text("mine")
    file = source(pickapic_rows(2))
    assert "exists and is not empty" in refused(capsys, file, output)
    assert "holds no dataset of diffpref" in refused(capsys, file, output, "--overwrite")
    (output / "dataset.json").write_text('{"format": "another"}')
    assert "does not describe a dataset of diffpref" in refused(capsys, file, output, "--overwrite")
    assert (output / "note.txt").read_text() == "mine"
    assert [path.name for path in output.parent.iterdir()] == ["pairs"]


def test_an_empty_output_folder_is_used(source, output):
    output.mkdir(parents=True)
    import_source("pickapic", source(pickapic_rows(2)), output)
    assert len(written(output)) == 2


def test_output_that_is_a_file(source, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert "exists and is no folder" in refused(capsys, source(pickapic_rows(1)), tmp_path / "taken")
    assert "cannot write" in refused(capsys, source(pickapic_rows(1)), tmp_path / "taken" / "below")
    assert (tmp_path / "taken").read_text() == "mine"


def test_overwrite_replaces_a_dataset_and_only_when_the_new_one_is_whole(source, output):
    import_source("pickapic", source(pickapic_rows(5)), output)
    with pytest.raises(UserError, match="rows are bad"):
        import_source("pickapic", source(pickapic_rows(1, truncated=3)), output, ImportOptions(overwrite=True))
    assert len(written(output)) == 5
    import_source("pickapic", source(pickapic_rows(2)), output, ImportOptions(overwrite=True))
    assert len(written(output)) == 2
    assert [path.name for path in output.parent.iterdir()] == ["pairs"]


def test_input_inside_the_output_is_refused(source, output, capsys):
    file = source(pickapic_rows(2))
    assert "would replace the input" in refused(capsys, file, file.parent, "--overwrite")
    assert file.exists()


def test_no_write_permission(source, output, capsys, monkeypatch):
    """Tests may run as root, whom no mode stops: the system call itself refuses here."""

    def mkdir(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    file = source(pickapic_rows(2))
    monkeypatch.setattr(os, "mkdir", mkdir)
    assert refused(capsys, file, output) == f"cannot write {output}: Permission denied"
    assert_nothing_at(output)


def test_a_full_disk_is_one_line_and_leaves_nothing(source, output, capsys, monkeypatch):
    def full(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    assert refused(capsys, source(pickapic_rows(2)), output) == f"cannot write {output}: No space left on device"
    assert_nothing_at(output)


def test_interruption_leaves_nothing(source, output, monkeypatch, capsys):
    calls, decode = [], images.decode

    def interrupt(data):
        calls.append(data)
        if len(calls) == 100:
            raise KeyboardInterrupt
        return decode(data)

    monkeypatch.setattr(images, "decode", interrupt)
    monkeypatch.setattr(writing, "GROUP_ROWS", 4)
    assert main(["data", "import", "pickapic", str(source(pickapic_rows(80))), str(output)]) == 130
    assert_nothing_at(output)
    assert not output.parent.exists()


def test_shards_and_row_groups_are_cut_by_size(tmp_path):
    with ShardWriter(tmp_path, "test", group_rows=3, shard_bytes=500) as shards:
        for number in range(10):
            shards.write(PairRow(str(number), "p", bytes(50), bytes(50)))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["test-00000.parquet", "test-00001.parquet"]
    sizes = [[pq.ParquetFile(file).metadata.row_group(g).num_rows for g in range(2)] for file in files]
    assert sizes == [[3, 3], [3, 1]]
    assert [row["id"] for row in written(tmp_path)] == [str(number) for number in range(10)]


def test_large_images_make_smaller_row_groups(tmp_path):
    with ShardWriter(tmp_path, "train") as shards:
        for number in range(3):
            shards.write(PairRow(str(number), "p", bytes(writing.GROUP_BYTES // 2), b"x"))
    metadata = pq.ParquetFile(tmp_path / "train-00000.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [2, 1]


def test_sources_by_name(capsys, source, output):
    assert find_source("pickapic").__name__ == "diffpref.data.sources.pickapic"
    assert main(["data", "import", "pickapick", str(source([])), str(output)]) == 2
    assert capsys.readouterr().err == "diffpref: unknown source 'pickapick': did you mean 'pickapic'?\n"


@pytest.mark.parametrize("split", ["", "a/b", "../up", "a-b"])
def test_split_names_make_no_paths(source, output, capsys, split):
    assert "is no name for a split" in refused(capsys, source(pickapic_rows(1)), output, "--split", split)


def test_unknown_commands_and_options(capsys):
    assert main(["data", "imprt"]) == 2
    assert capsys.readouterr().err == "diffpref: unknown command 'data imprt': did you mean 'import'?\n"
    assert main(["data", "import", "pickapic", "a", "b", "--tie", "drop"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["data", "import", "pickapic", "a", "b", "--ties", "sometimes"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
