"""WebDataset tars: pairs and single images, and hostile members that are counted beside the good ones."""

import json
import tarfile

import pytest
from support.commands import fails
from support.datasets import jpeg, pair_sample, special, truncated_jpeg, write_tar

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.importing import ImportOptions, import_source
from diffpref.data.schema import ImageRow, PairRow
from diffpref.data.sources import webdataset
from diffpref.errors import UserError


def test_pairs_in_several_shards(tmp_path):
    write_tar(tmp_path / "in" / "train-00000.tar", [*pair_sample(0), *pair_sample(1, label=0.25, id="mine")])
    write_tar(tmp_path / "in" / "train-00001.tar.gz", pair_sample(2, chosen_score_hps=0.5), "w:gz")
    summary = import_source("webdataset", tmp_path / "in", tmp_path / "out")
    assert list(PreferenceDataset.open(tmp_path / "out").rows()) == [
        PairRow("0000", "prompt 0", jpeg(0), jpeg(1), source="webdataset", scores={"chosen_score_hps": None}),
        PairRow(
            "mine", "prompt 1", jpeg(2), jpeg(3), label=0.25, source="webdataset", scores={"chosen_score_hps": None}
        ),
        PairRow("0002", "prompt 2", jpeg(4), jpeg(5), source="webdataset", scores={"chosen_score_hps": 0.5}),
    ]
    assert (summary.read, summary.kept) == (3, 3)


def test_single_images_with_a_prompt_in_a_text_file(tmp_path):
    members = [("0.png", jpeg(0)), ("0.txt", b"a cat"), ("1.jpg", jpeg(1)), ("1.txt", b"\xff"), ("2.webp", jpeg(2))]
    members += [("2.txt", b"a dog"), ("2.json", b'{"label": 1, "width": 5}')]
    write_tar(tmp_path / "a.tar", members)
    summary = import_source("webdataset", tmp_path / "a.tar", tmp_path / "out", ImportOptions(max_bad_share=0.5))
    assert list(PreferenceDataset.open(tmp_path / "out").rows()) == [
        ImageRow("0", "a cat", jpeg(0), source="webdataset"),
        ImageRow("2", "a dog", jpeg(2), label=1.0, source="webdataset"),
    ]
    assert summary.dropped == {"prompt_not_unicode": 1}


def test_hostile_members_are_counted_by_name(tmp_path):
    samples = [member for number in range(40) for member in pair_sample(number)]
    hostile = [("../../0.json", b"{}"), special("1.json", tarfile.SYMTYPE, "/etc/passwd"), pair_sample(3)[0]]
    write_tar(tmp_path / "in" / "a.tar", [*samples, *hostile, ("README", b"x")])
    summary = import_source("webdataset", tmp_path / "in", tmp_path / "out", ImportOptions(max_bad_share=0.1))
    assert (summary.read, summary.kept) == (44, 40)
    assert summary.dropped == {"unsafe_name": 1, "link": 1, "duplicate_sample": 1, "stray_member": 1}
    assert [str(row) for row in summary.bad_rows] == [
        "a.tar row 39: unsafe_name ('../../0.json')",
        "a.tar row 40: link ('1.json' -> '/etc/passwd')",
        "a.tar row 43: duplicate_sample ('0003')",
    ]
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a.tar",
        "dataset.json",
        "in",
        "out",
        "train-00000.parquet",
    ]


def test_samples_that_are_no_pair(tmp_path):
    members = [member for number in range(6) for member in pair_sample(number)]
    members += [("a.chosen.jpg", jpeg(0)), ("a.json", b'{"prompt": "p"}')]
    members += [("b.chosen.jpg", jpeg(0)), ("b.rejected.jpg", truncated_jpeg()), ("b.json", b'{"prompt": "p"}')]
    members += [("c.chosen.jpg", jpeg(0)), ("c.rejected.jpg", jpeg(1))]
    members += [("d.chosen.jpg", jpeg(0)), ("d.rejected.jpg", jpeg(1)), ("d.json", b'{"prompt": "p", "label": 7}')]
    members += [("e.chosen.jpg", jpeg(0)), ("e.rejected.jpg", jpeg(1)), ("e.json", json.dumps({"prompt": 5}).encode())]
    summary = import_source(
        "webdataset", write_tar(tmp_path / "a.tar", members), tmp_path / "out", ImportOptions(max_bad_share=0.5)
    )
    assert summary.kept == 6
    assert summary.dropped == {
        "image_empty": 1,
        "image_truncated": 1,
        "null_prompt": 1,
        "label_outside": 1,
        "prompt_wrong_type": 1,
    }


def test_an_image_of_the_json_is_no_image(tmp_path):
    sample = [("0.chosen.jpg", jpeg(0)), ("0.json", b'{"prompt": "p", "rejected": "/etc/hostname"}')]
    members = [*pair_sample(1), *sample]
    write_tar(tmp_path / "a.tar", members)
    summary = import_source("webdataset", tmp_path / "a.tar", tmp_path / "out", ImportOptions(max_bad_share=0.5))
    assert summary.dropped == {"rejected_wrong_type": 1}


def test_splits_by_name(tmp_path):
    write_tar(tmp_path / "in" / "train-00000.tar", pair_sample(0))
    write_tar(tmp_path / "in" / "test-00000.tar.gz", pair_sample(1), "w:gz")
    (row,) = webdataset.read(tmp_path / "in", "test")
    assert row.record.prompt == "prompt 1"
    with pytest.raises(UserError, match="holds the splits test, train: choose one"):
        webdataset.count(tmp_path / "in", "dev")


def test_what_is_refused(tmp_path, capsys):
    arguments = ["data", "import", "webdataset", str(tmp_path / "in"), str(tmp_path / "out")]
    assert fails(capsys, arguments) == f"{tmp_path / 'in'} does not exist"
    (tmp_path / "in").mkdir()
    assert fails(capsys, arguments) == f"{tmp_path / 'in'} holds no parquet, tar or JSON files"
    file = write_tar(tmp_path / "in" / "a.tar", [])
    assert fails(capsys, arguments) == f"{tmp_path / 'in'} is empty: it holds no rows"
    write_tar(file, [("0.jpg_0", b"x"), ("0.jpg_1", b"x"), ("0.json", b"{}")])
    assert fails(capsys, arguments).endswith("has Pick-a-Pic's columns: `diffpref data import pickapic` reads it")
    write_tar(file, [("0.choosen.jpg", b"x"), ("0.json", b"{}")])
    assert "no column 'chosen' (did you mean 'choosen'?)" in fails(capsys, arguments)
    write_tar(file, pair_sample(0))
    file.write_bytes(file.read_bytes()[:2000])
    assert "a.tar is not a readable tar file: " in fails(capsys, arguments)
    (tmp_path / "in" / "a.jsonl").write_text("{}")
    file.unlink()
    assert "a.jsonl is no tar file (.tar, .tar.gz or .tgz)" in fails(capsys, arguments)
    assert not (tmp_path / "out").exists()
