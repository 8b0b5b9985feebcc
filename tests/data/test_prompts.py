"""Prompts whose ends are cut off are counted in one warning."""

import logging
from dataclasses import replace

from support.tiny import SIDE, load, make_direct, make_pairs, write_pairs

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.prompts import warn_of_cut
from diffpref.data.store import build_store
from diffpref.train.config import DataConfig

LONG = "a red circle " * 40
DATA = DataConfig(resolution=SIDE)


def dataset(folder, prompts: list[str]) -> PreferenceDataset:
    return PreferenceDataset.open(write_pairs(folder, make_pairs(len(prompts), prompt=prompts)))


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_the_store_warns_once_when_it_encodes(tmp_path, pipeline, caplog):
    given = dataset(tmp_path / "data", [LONG, LONG, "short", LONG + "too", "other"])
    for _ in range(2):
        build_store(tmp_path / "store", given, load(pipeline), DATA)
    assert warnings(caplog) == ["2 of 5 prompts are longer than the text encoder reads; their ends are cut"]


def test_nothing_is_said_where_nothing_is_cut(tmp_path, pipeline, caplog):
    build_store(tmp_path / "store", dataset(tmp_path / "data", ["short", "other"]), load(pipeline), DATA)
    assert warnings(caplog) == []


def test_uncached_runs_count_at_their_start(tmp_path, pipeline, caplog):
    given = dataset(tmp_path / "data", [LONG, "short", "left out"])
    make_direct(replace(given, left_out={2: "not liked"}), load(pipeline), DATA).warn_of_cut_prompts()
    assert warnings(caplog) == ["1 of 2 prompts are longer than the text encoder reads; their ends are cut"]


def test_many_are_counted_in_groups(pipeline, caplog):
    prompts = dict.fromkeys(f"{LONG} {n}" if n % 2 else f"{n}" for n in range(2400))
    warn_of_cut(load(pipeline), prompts)
    assert warnings(caplog) == ["1,200 of 2,400 prompts are longer than the text encoder reads; their ends are cut"]
