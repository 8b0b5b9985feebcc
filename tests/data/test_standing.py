"""A command called again on its own finished output has nothing to do; whatever differs is refused as before."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.commands import fails
from support.datasets import jpeg, write_rows, write_trl
from support.tiny import make_pairs

from diffpref.__main__ import main

TAKEN = "out exists and is not empty: choose another folder, or --overwrite a dataset"


def work(name: str) -> list[str]:
    return {
        "import": ["import", "trl", "trl", "out", "--dedup"],
        "label": ["label", "in", "out", "--rule", "mean"],
        "caption": ["caption", "in", "out"],
        "perturb": ["perturb", "in", "out", "--seed", "1"],
        "select": ["select", "scored", "out", "--top", "6"],
        "pairs": ["pairs", "singles", "out", "--pairing", "all"],
        "trl": ["export", "trl", "in", "out"],
        "folder": ["export", "folder", "in", "out"],
        "webdataset": ["export", "webdataset", "in", "out"],
    }[name]


OTHERWISE = {
    "import": ["--min-side", "1"],
    "label": ["--rule", "agree"],
    "caption": [],
    "perturb": ["--level", "strong"],
    "select": ["--per-prompt", "2"],
    "pairs": ["--min-margin", "1e-9"],
    "trl": ["--shard-mb", "3"],
    "folder": [],
    "webdataset": ["--shard-mb", "3"],
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = ["a small red circle", "a large blue square", "a green cross"]
    write_rows(Path("in"), make_pairs(3, prompt=prompts))
    write_trl(Path("trl/train.parquet"), [(prompt, jpeg(2 * n), jpeg(2 * n + 1)) for n, prompt in enumerate(prompts)])


def stamps() -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(Path("out").rglob("*"))}


@pytest.mark.parametrize("name", OTHERWISE)
def test_the_same_again_does_nothing_and_tells_the_same(name, capsys):
    command = ["data", *work(name)]
    if name in ("select", "pairs"):
        assert main(["data", "label", "in", "scored"]) == 0
        assert main(["data", "select", "scored", "singles", "--top", "6"]) == 0
        capsys.readouterr()
    assert main([*command, "--json"]) == 0
    told, before = json.loads(capsys.readouterr().out), stamps()
    assert main([*command, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "diffpref: out is whole already: nothing to do\n"
    assert json.loads(shown.out) == told and stamps() == before
    if OTHERWISE[name]:
        assert fails(capsys, [*command, *OTHERWISE[name]]) == TAKEN
    assert main([*command, "--overwrite"]) == 0
    assert "whole already" not in capsys.readouterr().err and stamps() != before


def younger() -> None:
    file = next(file for folder in ("in", "trl") for file in Path(folder).glob("*.parquet"))
    later = Path("out/dataset.json").stat().st_mtime_ns + 10**9
    os.utime(file, ns=(later, later))


def fewer() -> None:
    file = next(Path("out").glob("*.parquet"))
    pq.write_table(pq.read_table(file).slice(1), file)


def broken() -> None:
    next(Path("out").glob("*.parquet")).write_bytes(b"PAR1")


def origin() -> None:
    described = json.loads(Path("in/dataset.json").read_text()) if Path("in/dataset.json").exists() else {}
    Path("in/dataset.json").write_text(json.dumps(described | {"format": "diffpref-pairs-1", "kept": 3, "read": 99}))
    os.utime("in/dataset.json", ns=(0, 0))


@pytest.mark.parametrize("change", [younger, fewer, broken, origin])
def test_a_changed_source_or_a_damaged_output_is_not_taken_for_it(capsys, change):
    command = ["data", "caption", "in", "out"]
    assert main(command) == 0
    change()
    assert fails(capsys, command) == TAKEN


def test_a_younger_file_of_an_import(capsys):
    assert main(["data", *work("import")]) == 0
    later = Path("out/dataset.json").stat().st_mtime_ns + 10**9
    os.utime("trl/train.parquet", ns=(later, later))
    assert fails(capsys, ["data", *work("import")]) == TAKEN
