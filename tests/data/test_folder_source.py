"""A folder of one's own: pairs or single images from metadata.jsonl or metadata.csv with image files beside."""

import csv
import json

import pytest
from support.commands import fails
from support.datasets import jpeg

from diffpref.__main__ import main
from diffpref.data import listings
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.importing import ImportOptions, import_source
from diffpref.data.schema import ImageRow, PairRow
from diffpref.errors import UserError


def put_images(folder, count: int = 4):
    for number in range(count):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "images" / f"{number}.jpg").write_bytes(jpeg(number))
    return folder


def jsonl(folder, rows: list, name: str = "metadata.jsonl"):
    put_images(folder)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def table(folder, rows: list[list[str]]):
    put_images(folder)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def pair(**changes) -> dict:
    row = {"chosen_file_name": "images/0.jpg", "rejected_file_name": "images/1.jpg", "prompt": "p"}
    return row | changes


def rows_of(folder, output, **options) -> list:
    import_source("folder", folder, output, ImportOptions(**options))
    return list(PreferenceDataset.open(output).rows())


def test_pairs(tmp_path):
    rows = [
        pair(),
        pair(prompt="q\u2028r", chosen_file_name="./images/3.jpg", label=0.25, chosen_model="m", group_id=4),
    ]
    assert rows_of(jsonl(tmp_path / "in", rows), tmp_path / "out") == [
        PairRow("metadata-0", "p", jpeg(0), jpeg(1), source="folder"),
        PairRow(
            "metadata-1", "q\u2028r", jpeg(3), jpeg(1), label=0.25, chosen_model="m", group_id="4", source="folder"
        ),
    ]


def test_single_images_with_scores(tmp_path):
    rows = [
        {"file_name": "images/0.jpg", "prompt": "p", "label": 1, "score_hps": 0.5},
        {"file_name": "images/1.jpg", "prompt": "q", "score_hps": None, "image_prompt": "of it"},
    ]
    assert rows_of(jsonl(tmp_path / "in", rows), tmp_path / "out") == [
        ImageRow("metadata-0", "p", jpeg(0), label=1.0, source="folder", scores={"score_hps": 0.5}),
        ImageRow("metadata-1", "q", jpeg(1), image_prompt="of it", source="folder", scores={"score_hps": None}),
    ]


def test_csv_with_quotes_newlines_and_empty_cells(tmp_path):
    long = "שלום " * 20_000
    head = ["prompt", "chosen_file_name", "rejected_file_name", "label", "weight"]
    rows = [
        ['a "cat",\nand more', "images/0.jpg", "images/1.jpg", "0.75", ""],
        [long, "images/2.jpg", "images/3.jpg", "", "2"],
    ]
    assert rows_of(table(tmp_path / "in", [head, *rows]), tmp_path / "out") == [
        PairRow("metadata-0", 'a "cat",\nand more', jpeg(0), jpeg(1), label=0.75, source="folder"),
        PairRow("metadata-1", long, jpeg(2), jpeg(3), weight=2.0, source="folder"),
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": None}, "null_prompt"),
        ({"prompt": ""}, "empty_prompt"),
        ({"prompt": 3}, "prompt_wrong_type (3 is not text)"),
        ({"prompt": "\ud800"}, "prompt_not_unicode"),
        ({"label": 1.5}, "label_outside (label is 1.5, not between 0 and 1)"),
        ({"label": "yes"}, "label_wrong_type ('yes' is not a number)"),
        ({"label": True}, "label_wrong_type (True is not a number)"),
        ({"weight": -1}, "weight_outside (weight is -1, not a finite number from 0)"),
        ({"chosen_model": ["m"]}, "chosen_model_wrong_type (['m'] is not text or whole numbers)"),
        ({"chosen_file_name": None}, "image_empty (the chosen image: no bytes)"),
        ({"chosen_file_name": 7}, "chosen_wrong_type (7 is not a file name)"),
        ({"chosen_file_name": "images/9.jpg"}, "no_file (chosen: 'images/9.jpg')"),
        ({"chosen_file_name": "images"}, "no_file (chosen: 'images')"),
        (
            {"rejected_file_name": "../secret.jpg"},
            "unsafe_name (rejected must stay inside the folder: '../secret.jpg')",
        ),
        (
            {"rejected_file_name": "/etc/hostname"},
            "unsafe_name (rejected must stay inside the folder: '/etc/hostname')",
        ),
        ({"rejected_file_name": "a\\b.jpg"}, "unsafe_name (rejected must stay inside the folder: 'a\\\\b.jpg')"),
    ],
)
def test_a_bad_row_is_named_and_counted(tmp_path, changes, reason):
    (tmp_path / "secret.jpg").write_bytes(jpeg(9))
    folder = jsonl(tmp_path / "in", [pair(), json.dumps(pair(**changes))])
    summary = import_source("folder", folder, tmp_path / "out", ImportOptions(max_bad_share=0.5))
    assert (summary.read, summary.kept) == (2, 1)
    assert str(summary.bad_rows[0]) == f"metadata.jsonl row 1: {reason}"


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"prompt": "p"} x', "\udcff"])
def test_a_line_that_is_no_object(tmp_path, line):
    folder = jsonl(tmp_path / "in", [pair()])
    with (folder / "metadata.jsonl").open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n\n" + json.dumps(pair()).encode())
    summary = import_source("folder", folder, tmp_path / "out", ImportOptions(max_bad_share=0.5))
    assert (summary.read, summary.kept, summary.dropped) == (3, 2, {"not_json": 1})
    assert summary.bad_rows[0].row == 1


def test_files_that_are_too_large_or_cannot_be_read(tmp_path, monkeypatch):
    folder = jsonl(tmp_path / "in", [pair(), pair(chosen_file_name="images/2.jpg"), pair(chosen_file_name="x" * 300)])
    (folder / "images" / "2.jpg").write_bytes(bytes(5001))
    monkeypatch.setattr(listings, "MAX_BYTES", 5000)
    summary = import_source("folder", folder, tmp_path / "out", ImportOptions(max_bad_share=0.7))
    assert summary.dropped == {"file_too_large": 1, "unreadable_file": 1}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_line_that_no_memory_holds_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(listings, "MAX_TEXT", 300)
    folder = jsonl(tmp_path / "in", [pair(), " " * 300 + "{}"], name)
    with pytest.raises(UserError, match=rf"{name} has a line of over 300 characters"):
        import_source("folder", folder, tmp_path / "out")


def test_a_csv_row_of_wrong_length_and_a_missing_file(tmp_path):
    head = ["prompt", "file_name"]
    folder = table(tmp_path / "in", [head, ["p", "images/0.jpg"], ["p"], ["p", "images/0.jpg", "x"], ["p", "none.jpg"]])
    summary = import_source("folder", folder, tmp_path / "out", ImportOptions(max_bad_share=0.8))
    assert [str(row) for row in summary.bad_rows] == [
        "metadata.csv row 1: wrong_cells (1 cells under 2 columns)",
        "metadata.csv row 2: wrong_cells (3 cells under 2 columns)",
        "metadata.csv row 3: no_file (image: 'none.jpg')",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,file_name\n\xff,b\n", r"metadata\.csv is not UTF-8"),
        (b'prompt,file_name\n"open,b\n', r"metadata\.csv is not a readable CSV file"),
        (b"prompt,prompt\n", r"metadata\.csv has two columns 'prompt'"),
        (b"", r"in is empty: it holds no rows"),
        (b"prompt,file_name\n", r"in is empty: it holds no rows"),
        (b"prompt,filename\np,a.jpg\n", r"has no column 'chosen_file_name' \(did you mean 'filename'\?\)"),
        (b"promt,file_name\np,a.jpg\n", r"has no column 'prompt' \(did you mean 'promt'\?\)"),
        (b"prompt,chosen_file_name\np,a.jpg\n", r"has no column 'rejected_file_name'"),
        (b"prompt,file_name,lable\np,a.jpg,1\n", r"has a column 'lable': rename it to 'label' or drop it"),
    ],
)
def test_lists_that_are_refused(tmp_path, content, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_source("folder", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_list_and_two_lists(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    arguments = ["data", "import", "folder", str(tmp_path / "in"), str(tmp_path / "out")]
    assert fails(capsys, arguments) == f"{tmp_path / 'in'} holds no metadata.jsonl and no metadata.csv"
    jsonl(tmp_path / "in", [pair()])
    table(tmp_path / "in", [["prompt"]])
    assert fails(capsys, arguments) == f"{tmp_path / 'in'} holds metadata.jsonl and metadata.csv: remove one of them"
    arguments[3] = str(tmp_path / "absent")
    assert fails(capsys, arguments) == f"{tmp_path / 'absent'} does not exist"


def test_the_list_itself_may_be_given_and_its_columns_named(tmp_path):
    folder = jsonl(tmp_path / "in", [{"good": "images/0.jpg", "bad": "images/1.jpg", "prompt": "p"}], "mine.jsonl")
    arguments = ["data", "import", "folder", str(folder / "mine.jsonl"), str(tmp_path / "out")]
    assert main([*arguments, "--columns", "chosen=good", "rejected=bad"]) == 0
    (row,) = PreferenceDataset.open(tmp_path / "out").rows()
    assert (row.id, row.chosen, row.rejected) == ("mine-0", jpeg(0), jpeg(1))


def test_what_generate_writes_is_read(tmp_path, capsys):
    row = {"file_name": "images/0.jpg", "prompt": "p", "index": 0, "seed": 5}
    assert rows_of(jsonl(tmp_path / "in", [row]), tmp_path / "out") == [
        ImageRow("metadata-0", "p", jpeg(0), source="folder")
    ]
    assert "left out: index, seed" in capsys.readouterr().err


def test_the_order_is_that_of_the_list(tmp_path):
    rows = [pair(prompt=str(number), chosen_file_name=f"images/{number % 4}.jpg") for number in (3, 1, 2, 0)]
    found = rows_of(jsonl(tmp_path / "in", rows), tmp_path / "out")
    assert [(row.prompt, row.chosen) for row in found] == [(str(n), jpeg(n)) for n in (3, 1, 2, 0)]
