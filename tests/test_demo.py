"""The demo end to end: quickly with a few steps, and (slow) its claim for three training seeds."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from diffpref import presets
from diffpref.__main__ import main

KEYS = {
    "win_rate", "win_rate_low", "win_rate_high", "prompts", "judge_base", "judge_tuned", "implicit_accuracy",
    "pairs_per_second", "report",
}  # fmt: skip


@pytest.fixture
def hurried(monkeypatch):
    """The demo's preset with a few steps only."""
    preset = presets.PRESETS["embedded-dpo"]
    preset = replace(
        preset,
        train=replace(preset.train, max_steps=3, batch_size=4),
        validation=replace(preset.validation, num_inference_steps=2, pairs=16, images=2),
    )
    monkeypatch.setitem(presets.PRESETS, "embedded-dpo", preset)


def test_the_whole_path(hurried, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("the demo opened the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    output = tmp_path / "demo"
    assert main(["demo", "--output-dir", str(output)]) == 0
    shown = capsys.readouterr().out
    result = json.loads((output / "result.json").read_text())
    assert set(result) == KEYS
    assert result["prompts"] == 216
    assert 0 <= result["win_rate_low"] <= result["win_rate"] <= result["win_rate_high"] <= 1
    assert f"{result['win_rate']:.1%}" in shown and result["report"] in shown
    assert (output / "report.html").stat().st_size > 50_000
    assert len(list((output / "base").glob("*.png"))) == len(list((output / "tuned").glob("*.png"))) == 216
    # Again it finds everything done and says the same.
    changed = (output / "base" / "00000-0.png").stat().st_mtime_ns
    assert main(["demo", "--output-dir", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert (output / "base" / "00000-0.png").stat().st_mtime_ns == changed
    # Another training seed is another run.
    assert main(["demo", "--output-dir", str(output), "--seed", "1"]) == 2
    assert "train.seed: the run to resume has 0" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["demo", "--output-dir", str(tmp_path)]) == 2
    assert "holds something other than a demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_claim(tmp_path, seed):
    command = [sys.executable, "-m", "diffpref", "demo", "--seed", str(seed), "--output-dir", str(tmp_path), "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"seed {seed}: {time.monotonic() - started:.0f} s, {result}")
    assert result["win_rate_low"] > 0.60
    assert result["judge_tuned"] > result["judge_base"]
