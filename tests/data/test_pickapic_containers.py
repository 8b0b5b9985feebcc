"""Pick-a-Pic from tar shards and from JSON: the same pairs as from parquet."""

import json
from dataclasses import replace

import pytest
from support.commands import fails
from support.datasets import pickapic_row, pickapic_rows, special, write_pickapic, write_tar

from diffpref.data.importing import ImportOptions, import_source
from diffpref.data.schema import Found
from diffpref.data.sources import pickapic
from diffpref.errors import UserError

ROWS = [
    pickapic_row(0),
    pickapic_row(1, label_0=0.0, label_1=1.0),
    pickapic_row(2, label_0=0.5),
    *pickapic_rows(0, null_caption=1, label_outside=1, no_label=1),
    pickapic_row(3, label_0=None),
    pickapic_row(4, label_1=1.0),
]


def parquet_rows(tmp_path, rows) -> list:
    """What the parquet source gives, without names of files."""
    found = list(pickapic.read(write_pickapic(tmp_path / "oracle.parquet", rows), "train"))
    return [bare(row) for row in found]


def bare(row):
    if isinstance(row, Found):
        return replace(row, file="", record=replace(row.record, id=""))
    return replace(row, file="")


def sample(number: int, row: dict) -> list[tuple[str, bytes]]:
    described = {name: value for name, value in row.items() if not name.startswith("jpg_")}
    key = f"{number:06d}"
    images = [(f"{key}.jpg_{side}", row[f"jpg_{side}"]) for side in (0, 1)]
    return [*images, (f"{key}.json", json.dumps(described).encode())]


def tar_of(file, rows):
    return write_tar(file, [member for number, row in enumerate(rows) for member in sample(number, row)])


def listed(folder, rows) -> list[dict]:
    """The rows as a list has them, their images beside it."""
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        for side in (0, 1):
            (folder / f"{number}-{side}.jpg").write_bytes(row[f"jpg_{side}"])
    return [row | {f"jpg_{side}": f"{number}-{side}.jpg" for side in (0, 1)} for number, row in enumerate(rows)]


def test_tar_shards_give_the_same_pairs(tmp_path):
    tar_of(tmp_path / "in" / "train-00000.tar", ROWS)
    assert [bare(row) for row in pickapic.read(tmp_path / "in", "train")] == parquet_rows(tmp_path, ROWS)
    assert pickapic.count(tmp_path / "in", "train") == len(ROWS)
    assert next(iter(pickapic.read(tmp_path / "in", "train"))).record.id == "000000"


@pytest.mark.parametrize("form", ["jsonl", "json", "indented"])
def test_json_with_images_beside_gives_the_same_pairs(tmp_path, form):
    rows = listed(tmp_path / "in", ROWS)
    text = (
        "\n".join(map(json.dumps, rows))
        if form == "jsonl"
        else json.dumps(rows, indent=2 if form == "indented" else None)
    )
    file = tmp_path / "in" / ("train.jsonl" if form == "jsonl" else "train.json")
    file.write_text(text, encoding="utf-8")
    assert [bare(row) for row in pickapic.read(tmp_path / "in", "train")] == parquet_rows(tmp_path, ROWS)
    assert pickapic.count(file, "train") == len(ROWS)


def test_a_long_array_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("diffpref.data.listings.CHUNK", 50)
    rows = [
        row | {"caption": f'"[{{}},]\\ é{number}' * 9}
        for number, row in enumerate(listed(tmp_path / "in", ROWS[:3] * 9))
    ]
    (tmp_path / "in" / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row.record.prompt for row in pickapic.read(tmp_path / "in", "train")] == [row["caption"] for row in rows]


def test_elements_of_an_array_are_not_cut_where_the_pieces_are(tmp_path, monkeypatch):
    monkeypatch.setattr("diffpref.data.listings.CHUNK", 3)
    (row,) = listed(tmp_path / "in", ROWS[:1])
    (tmp_path / "in" / "a.json").write_text(f"[123456, {json.dumps(row)}, 1.5e3]")
    found = list(pickapic.read(tmp_path / "in", "train"))
    assert [getattr(each, "reason", each.row) for each in found] == ["not_json", 1, "not_json"]


@pytest.mark.parametrize("content", ["", "{}", '[{"caption": 1}', '[{"caption": "a"} {', "[1, 2", '[{"a": ]'])
def test_an_array_that_breaks_off_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json (is broken or cut short|holds no JSON array)"):
        pickapic.count(tmp_path / "a.json", "train")


def test_hostile_members_and_files_are_dropped(tmp_path):
    rows = [pickapic_row(number) for number in range(20)]
    members = [member for number, row in enumerate(rows) for member in sample(number, row)]
    write_tar(tmp_path / "a.tar", [*members, ("../x.jpg_0", b""), special("9.jpg_1", b"2", "/etc/passwd")])
    summary = import_source("pickapic", tmp_path / "a.tar", tmp_path / "out", ImportOptions(max_bad_share=0.1))
    assert (summary.kept, summary.dropped) == (20, {"unsafe_name": 1, "link": 1})
    rows = listed(tmp_path / "in", rows)
    rows[3]["jpg_0"], rows[4]["jpg_1"] = "../a.tar", "gone.jpg"
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = import_source("pickapic", tmp_path / "in", tmp_path / "other", ImportOptions(max_bad_share=0.1))
    assert (summary.kept, summary.dropped) == (18, {"unsafe_name": 1, "no_file": 1})


def test_columns_of_other_names(tmp_path):
    """Of parquet too, with the same pairs."""
    rename = {"caption": "text", "label_0": "won"}
    write_pickapic(tmp_path / "in" / "train.parquet", ROWS, rename=rename)
    rows = [bare(row) for row in pickapic.read(tmp_path / "in", "train", rename)]
    assert rows == parquet_rows(tmp_path, ROWS)
    options = ImportOptions(columns=rename, max_bad_share=0.9)
    assert import_source("pickapic", tmp_path / "in", tmp_path / "out", options).kept == 3


def test_columns_are_checked(tmp_path, capsys):
    rows = [pickapic_row(0)]
    for row in rows:
        row["captoin"] = row.pop("caption")
    arguments = ["data", "import", "pickapic", str(tar_of(tmp_path / "a.tar", rows)), str(tmp_path / "out")]
    assert fails(capsys, arguments).endswith("a.tar has no column 'caption' (did you mean 'captoin'?)")
    rows = [pickapic_row(0)]
    rows[0]["has_lable"] = rows[0].pop("has_label")
    tar_of(tmp_path / "a.tar", rows)
    assert fails(capsys, arguments).endswith("has a column 'has_lable': rename it to 'has_label' or drop it")


def test_a_sample_without_its_json_is_a_bad_row(tmp_path):
    members = [member for number in range(3) for member in sample(number, pickapic_row(number))]
    file = write_tar(tmp_path / "a.tar", [member for member in members if member[0] != "000001.json"])
    assert [getattr(row, "reason", "") for row in pickapic.read(file, "train")] == ["", "null_caption", ""]
