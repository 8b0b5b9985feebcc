"""Prompt sets of every published form, and what is wrong with files that are of none."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpref.__main__ import main
from diffpref.errors import UserError
from diffpref.evaluate.generate import wishes
from diffpref.evaluate.prompts import Prompt, read_prompts

HEADER = "Prompt\tCategory\tChallenge\tNote\n"


def write(file: Path, text: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
    return str(file)


def captions(file: Path, *texts: str | None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"caption": pa.array(texts, pa.string()), "label_0": [1.0] * len(texts)}), file)


def test_a_text_file_without_blank_lines_and_repetitions(tmp_path, caplog):
    source = write(tmp_path / "p.txt", "\ufeffa cat\r\n\r\n  a dog \na cat\n\n")
    assert read_prompts(source) == [Prompt("a cat"), Prompt("a dog")]
    assert "1 of 3 prompts of" in caplog.text and "repetitions" in caplog.text


def test_hpdv2s_benchmark_has_styles(tmp_path, caplog):
    for style, prompts in {"photo": ["a cat", "a dog"], "anime": ["a cat", " ", "a girl"]}.items():
        write(tmp_path / "benchmark" / f"{style}.json", json.dumps(prompts))
    expected = [Prompt("a cat", "anime"), Prompt("a girl", "anime"), Prompt("a dog", "photo")]
    assert read_prompts(str(tmp_path / "benchmark")) == expected
    assert "1 of 4 prompts" in caplog.text


def test_partiprompts_keeps_quotes_and_takes_categories(tmp_path):
    rows = [
        'A sign that says "Hi"\tWorld Knowledge\tComplex\t\n',
        '"quoted ""twice""\tArts\tBasic\tnote\r\n',
        "\n",
        "a fox\tAnimals\n",
        "no kind\t\tBasic\t",
    ]
    assert read_prompts(write(tmp_path / "PartiPrompts.tsv", HEADER + "".join(rows))) == [
        Prompt('A sign that says "Hi"', "World Knowledge"),
        Prompt('"quoted ""twice""', "Arts"),
        Prompt("a fox", "Animals"),
        Prompt("no kind"),
    ]


def test_pick_a_pics_captions_of_a_split(tmp_path):
    captions(tmp_path / "in" / "data" / "test-00000-of-00001.parquet", "a cat", None, "a cat", " ")
    captions(tmp_path / "in" / "data" / "test_unique-00000-of-00001.parquet", "a dog")
    (tmp_path / "in" / "dataset_infos.json").write_text("{}")
    assert read_prompts(str(tmp_path / "in"), "test") == [Prompt("a cat")]
    assert read_prompts(str(tmp_path / "in"), "test_unique") == [Prompt("a dog")]
    with pytest.raises(UserError, match="holds the splits test, test_unique: choose one of them with --split"):
        read_prompts(str(tmp_path / "in"))
    single = tmp_path / "in" / "data" / "test-00000-of-00001.parquet"
    assert read_prompts(str(single)) == [Prompt("a cat")]


def test_a_dataset_of_pairs(tiny_pairs):
    found = read_prompts(str(tiny_pairs))
    assert found[0] == Prompt("a red circle number 0") and len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", '{"prompt": "a"}', "is no array of prompts but an object"),
        ("p.json", '["a", 3]', "is no array of prompts: element 1 is a number"),
        ("p.json", "[", "cannot be read as JSON"),
        ("p.json", '["\\ud800"]', "not valid Unicode"),
        ("p.json", "[]", "holds no prompt"),
        ("p.tsv", "Prompts\tCategory\na\tb\n", "has no column Prompt: its first line should be Prompt | Category"),
        ("p.tsv", HEADER + "a\tb\tc\td\te\n", "line 2 has 5 columns, the first line 4"),
        ("p.tsv", HEADER + "a\tb\n\tArts\tBasic\t\n", "line 3 has no prompt"),
        ("p.tsv", "", "has no column Prompt"),
        ("p.txt", "\n \n", "holds no prompt"),
    ],
)
def test_files_of_no_form_give_one_line(tmp_path, name, text, message):
    source = write(tmp_path / name, text)
    with pytest.raises(UserError) as caught:
        read_prompts(source)
    assert str(caught.value).startswith(f"prompts: {source}") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_and_splits_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither parquet files nor lists of prompts"):
        read_prompts(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"p\.txt has no splits"):
        read_prompts(write(tmp_path / "p.txt", "a"), "test")
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        read_prompts(str(tmp_path / "none.txt"))


def test_the_category_is_no_part_of_the_seed():
    (plain,), (kind,) = wishes([Prompt("a")], 1, 0), wishes([Prompt("a", "photo")], 1, 0)
    assert plain.seed == kind.seed
    assert "category" not in plain.line() and kind.line()["category"] == "photo"


def test_categories_reach_the_images(pipeline, tmp_path):
    for style in ("photo", "anime"):
        write(tmp_path / "in" / f"{style}.json", json.dumps([f"a {style}"]))
    given = ["--prompts", str(tmp_path / "in"), "--steps", "1", "--guidance-scale", "1"]
    assert main(["generate", str(pipeline), str(tmp_path / "out"), *given]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["category"]) for row in rows] == [("a anime", "anime"), ("a photo", "photo")]
