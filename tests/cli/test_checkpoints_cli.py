"""`diffpref checkpoints`, and the messages with which `train` and `demo` stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.commands import fails

import diffpref.demo
from diffpref.__main__ import main
from diffpref.cli.parsing import seconds_of
from diffpref.errors import Stopped, UserError
from diffpref.train import loop
from diffpref.train.checkpoint import capture, save


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with the checkpoints of steps 5 and 10, of which the first is the best."""
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    state = {"processes": 2, "items_per_step": 2048, "looked": True}
    for step in (5, 10):
        extra = {"points": {"count": torch.ones(2)}, "ema": dict(net.named_parameters())}
        save(tmp_path / "run" / "checkpoints", capture(step, net, optimizer, state, extra), keep=0)
    best = {"step": 5, "scorer": "hpsv2", "value": 0.25}
    (tmp_path / "run" / "checkpoints" / "best.json").write_text(json.dumps(best))
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-5", tmp_path / "run" / "checkpoints" / ".step-7-a.part")
    return tmp_path / "run"


def test_the_list(run, capsys):
    size = sum(file.stat().st_size for file in (run / "checkpoints" / "step-5").iterdir())
    assert main(["checkpoints", str(run)]) == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert shown.err == "" and len(lines) == 6
    assert lines[0] == ["state", "holds", "step", "bytes", "processes", "items", "a", "step"]
    parts = ["weights,", "optimizer,", "ema,", "points"]
    assert lines[1] == ["best,", "whole", *parts, "5", f"{size:,}", "2", "2,048"]
    assert lines[2][:5] == ["whole", *parts] and lines[2][5] == "10"
    assert shown.out.endswith("\n\n--resume goes on from step 10\nbest: step 5, 0.25 by hpsv2\n")


def test_a_damaged_checkpoint_is_named_and_the_code_is_1(run, capsys):
    weights = run / "checkpoints" / "step-10" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["checkpoints", str(run), "--json"]) == 1
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    first, second = told["checkpoints"]
    assert first["parts"] == ["weights", "optimizer", "ema", "points"] and first["best"] and first["damage"] is None
    assert (first["step"], first["processes"], first["items_per_step"], first["looked"]) == (5, 2, 2048, True)
    assert second["step"] == 10 and second["damage"].startswith("weights.safetensors has ") and not second["best"]
    assert (told["resumes"], told["best"]["step"]) == (5, 5)
    assert shown.err == f"diffpref: 1 of 2 checkpoints damaged: step 10 ({second['damage']})\n"
    (run / "checkpoints" / "step-5" / "manifest.json").write_text("{")
    assert main(["checkpoints", str(run)]) == 1
    shown = capsys.readouterr()
    assert "--resume starts from the beginning" in shown.out and "2 of 2 checkpoints damaged: step 5" in shown.err


def test_a_run_without_checkpoints(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no checkpoints\n\n--resume starts from the beginning\n"


def test_what_is_no_run_folder_is_refused(run, capsys):
    assert "does not exist" in fails(capsys, ["checkpoints", str(run / "missing")])
    for wrong in (run / "checkpoints", run / "checkpoints" / "step-5"):
        assert fails(capsys, ["checkpoints", str(wrong)]).endswith(f"did you mean {run}?")
    assert "is no run folder" in fails(capsys, ["checkpoints", str(run.parent)])


def test_listing_needs_no_torch(run):
    program = f"import sys\nfrom diffpref.__main__ import main\nmain(['checkpoints', {str(run)!r}])\n"
    program += "assert 'torch' not in sys.modules\n"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2700), ("3h30m", 12600), ("2d", 172800), ("1d2h3m4s", 93784), ("60", 60)]
)
def test_times(text, seconds):
    assert seconds_of(text, "--max-time") == seconds


@pytest.mark.parametrize("text", ["", "0", "0h", "3x", "h", "30m3h", "-5m", "1.5h", "3 h", "01:30:00"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UserError, match=r"^--max-time: .* is no time; write it as 3h30m, 45m, 2d, 90s or in seconds$"):
        seconds_of(text, "--max-time")


def test_a_wrong_time_is_one_line(capsys):
    assert fails(capsys, ["train", "embedded-dpo", "--max-time", "soon"]).startswith("--max-time: 'soon' is no time")
    assert fails(capsys, ["train", "embedded-dpo", "--max-time"]) == "--max-time needs a value"


def test_train_says_how_to_go_on(capsys, monkeypatch):
    given = {}

    def stopped(config, resume, until, profile):
        given.update(resume=resume, left=until - time.monotonic())
        raise Stopped("stopped by SIGTERM after step 7, whose checkpoint is complete", 143)

    monkeypatch.setattr(loop, "train", stopped)
    arguments = ["embedded-dpo", "--output-dir", "a run", "--max-time", "1h"]
    for more in ([], ["--resume"]):
        assert main(["train", *arguments, *more]) == 143
        shown = capsys.readouterr()
        assert shown.out == "" and given["resume"] == bool(more) and 3500 < given["left"] <= 3600
        assert shown.err == (
            "diffpref: stopped by SIGTERM after step 7, whose checkpoint is complete; go on with: "
            "diffpref train embedded-dpo --output-dir 'a run' --max-time 1h --resume\n"
        )


def test_a_stopped_demo_goes_on_by_the_same_command(capsys, monkeypatch, tmp_path):
    def interrupted(config, resume):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    def stopped(config, resume):
        raise Stopped("stopped by SIGINT after step 7, whose checkpoint is complete", 130)

    monkeypatch.setattr(diffpref.demo, "import_embedded", lambda path: path.mkdir(exist_ok=True))
    monkeypatch.setattr(diffpref.demo, "train", stopped)
    assert main(["demo", "--output-dir", str(tmp_path / "demo")]) == 130
    told = "diffpref: stopped by SIGINT after step 7, whose checkpoint is complete; the same command goes on"
    assert capsys.readouterr().err.splitlines()[-1] == told
    monkeypatch.setattr(diffpref.demo, "train", interrupted)  # outside of training Ctrl-C is what it was
    assert main(["demo", "--output-dir", str(tmp_path / "demo")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "diffpref: interrupted"
