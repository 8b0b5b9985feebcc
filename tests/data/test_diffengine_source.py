"""diffengine's metadata.csv: both winners, ties, and every fault by its reason."""

import pytest
from support.commands import fails
from support.datasets import jpeg

from diffpref.data.importing import ImportOptions, import_source
from diffpref.data.schema import Found, PairRow
from diffpref.data.sources import diffengine

HEAD = "image,image2,text,label_0\n"


def folder(path, lines: str, head: str = HEAD):
    (path / "in").mkdir()
    for number in range(2):
        (path / "in" / f"{number}.jpg").write_bytes(jpeg(number))
    (path / "in" / "metadata.csv").write_text(head + lines, encoding="utf-8")
    return path / "in"


def test_winners_and_ties(tmp_path):
    path = folder(tmp_path, "0.jpg,1.jpg,a cat,1\n0.jpg,1.jpg,a dog,0.0\n0.jpg,1.jpg,a cow,0.5\n")
    assert list(diffengine.read(path, "train")) == [
        Found("metadata.csv", 0, PairRow("metadata-0", "a cat", jpeg(0), jpeg(1), source="diffengine")),
        Found("metadata.csv", 1, PairRow("metadata-1", "a dog", jpeg(1), jpeg(0), source="diffengine")),
        Found("metadata.csv", 2, PairRow("metadata-2", "a cow", jpeg(0), jpeg(1), label=0.5, source="diffengine")),
    ]
    assert diffengine.count(path, "train") == 3
    assert list(diffengine.read(path / "metadata.csv", "train")) == list(diffengine.read(path, "train"))


def test_every_fault_is_counted(tmp_path):
    lines = "0.jpg,1.jpg,a cat,1\n" * 4
    lines += "0.jpg,1.jpg,,1\n0.jpg,1.jpg,p,\n0.jpg,1.jpg,p,0.7\n0.jpg,1.jpg,p,nan\n9.jpg,1.jpg,p,1\n0.jpg,,p,1\n"
    summary = import_source("diffengine", folder(tmp_path, lines), tmp_path / "out", ImportOptions(max_bad_share=0.6))
    assert (summary.read, summary.kept) == (10, 4)
    assert summary.dropped == {"null_label": 2, "null_text": 1, "label_outside": 1, "no_file": 1, "image_empty": 1}


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("image,image_2,text,label_0\n", "has no column 'image2' (did you mean 'image_2'?)"),
        ("image,image2,text\n", "has no column 'label_0' (did you mean 'image2'?)"),
    ],
)
def test_missing_and_misspelt_columns(tmp_path, capsys, head, message):
    lines = "0.jpg,1.jpg,p" + (",1" if "label_0" in head else "") + "\n"
    arguments = ["data", "import", "diffengine", str(folder(tmp_path, lines, head)), str(tmp_path / "out")]
    shown = fails(capsys, arguments)
    assert shown.startswith(f"{tmp_path / 'in' / 'metadata.csv'} {message.partition(' (')[0]}")


def test_no_list(tmp_path, capsys):
    arguments = ["data", "import", "diffengine", str(tmp_path), str(tmp_path / "out")]
    assert fails(capsys, arguments) == f"{tmp_path} holds no metadata.csv"
    arguments[3] += "/absent"
    assert fails(capsys, arguments) == f"{tmp_path}/absent does not exist"
