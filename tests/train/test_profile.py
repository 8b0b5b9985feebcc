"""`--profile`: a table whose parts are the step, a trace, and the same run as without it."""

import gzip
import json

import pytest
from support.commands import fails
from support.runs import finals, logged, tiny_config

from diffpref.cli.parsing import take_count
from diffpref.errors import UserError
from diffpref.objectives import DRO
from diffpref.points import Replay
from diffpref.train.config_file import to_yaml
from diffpref.train.loop import train

STEP = {"data", "points", "reference forward", "policy forward", "loss", "backward", "clip", "read", "optimizer"}


def test_the_regions_are_the_step_and_the_run_is_the_same(pipeline, tiny_pairs, tmp_path):
    import torch

    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=6, gradient_accumulation_steps=2, ema=True)
    run = train(config, profile=3)
    found = json.loads((run / "profile" / "profile.json").read_text())
    rows = {row["region"]: row for row in found["regions"]}
    assert rows.keys() >= STEP | {"average", "log", "other", "checkpoint"}
    assert found["steps"] == 3 and found["device"] == "cpu"
    assert sum(row["seconds"] for row in rows.values()) == pytest.approx(found["seconds_a_step"])
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["other"]["seconds"] >= 0
    assert rows["backward"]["calls"] == 2 and rows["optimizer"]["calls"] == 1
    assert rows["backward"]["seconds"] > rows["read"]["seconds"]
    assert "| backward | 2.0 |" in (run / "profile" / "profile.md").read_text()
    with gzip.open(run / "profile" / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("policy forward") == 4 and names.count("clip") == 2  # of two steps
    plain = train(tiny_config(pipeline, tiny_pairs, tmp_path / "plain", **vars_of(config)))
    assert not (plain / "profile").exists()
    assert logged(plain) == logged(run)
    assert all(torch.equal(a, b) for a, b in zip(finals(plain), finals(run), strict=True))


def vars_of(config) -> dict:
    return {key: getattr(config.train, key) for key in ("max_steps", "gradient_accumulation_steps", "ema")}


def test_a_short_run_is_measured_too_and_the_sampler_has_its_row(pipeline, tiny_pairs, tmp_path):
    from dataclasses import replace

    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=3)
    run = train(replace(config, objective=DRO(), points=Replay(steps=2, sampler="ddim")), profile=10)
    found = json.loads((run / "profile" / "profile.json").read_text())
    assert found["steps"] == 3
    assert "sampler" in {row["region"] for row in found["regions"]}


def test_the_option_takes_a_number_or_none():
    assert take_count(["--resume"], "--profile", 10) == (0, ["--resume"])
    assert take_count(["--profile"], "--profile", 10) == (10, [])
    assert take_count(["--profile", "--resume"], "--profile", 10) == (10, ["--resume"])
    assert take_count(["--a", "--profile", "3", "b"], "--profile", 10) == (3, ["--a", "b"])
    assert take_count(["--profile=4"], "--profile", 10) == (4, [])
    with pytest.raises(UserError, match="--profile: 'x' is not a whole number above 0"):
        take_count(["--profile", "x"], "--profile", 10)


def test_a_wrong_number_is_refused(capsys, pipeline, tiny_pairs, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(tiny_config(pipeline, tiny_pairs, tmp_path / "run")))
    line = fails(capsys, ["train", "--config", str(file), "--profile", "0"])
    assert line == "--profile: '0' is not a whole number above 0"
