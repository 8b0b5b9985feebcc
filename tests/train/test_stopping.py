"""A run that is told to stop finishes its step, leaves a whole checkpoint, and goes on from there as if nothing was."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from support.killing import ROOT
from support.runs import finals, logged, tiny_config

from diffpref.errors import Stopped
from diffpref.train import loop, stopping
from diffpref.train.checkpoint import newest
from diffpref.train.loop import train
from diffpref.train.run_folder import RunFolder
from diffpref.train.step import Learner
from diffpref.train.stopping import NAMES, Stop

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138, signal.SIGALRM: 0}


def tell_at(monkeypatch, number: int, at: int) -> None:
    """Let the process get a signal in the middle of step `at`, counted from 0."""
    real = Learner.look

    def look(self, step, micro):
        found = real(self, step, micro)
        if step == at:
            os.kill(os.getpid(), number)
        return found

    monkeypatch.setattr(Learner, "look", look)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in NAMES]


def assert_same_runs(one, other) -> None:
    """Equal in weights, in what was logged, and in what was looked at."""
    assert all(torch.equal(a, b) for a, b in zip(finals(one), finals(other), strict=True))
    assert logged(one) == logged(other)
    assert looked_at(one) == looked_at(other)


def looked_at(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" not in line]


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_the_code_is_that_of_the_signal(number, code):
    with Stop(time.monotonic() + 3600) as stop, stop.noted():
        os.kill(os.getpid(), number)
        assert stop.agreed
    assert stop.stopped().code == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGALRM, 0)])
def test_a_told_run_finishes_its_step_and_goes_on(pipeline, tiny_pairs, tmp_path, monkeypatch, capfd, number, code):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "uncut", max_steps=5, ema=True)
    uncut, told = train(config), replace(config, output_dir=str(tmp_path / "told"))
    before = handlers()
    with monkeypatch.context() as patch:
        tell_at(patch, number, at=2)
        with pytest.raises(
            Stopped, match=f"stopped by {NAMES[number]} after step 3, whose checkpoint is complete"
        ) as end:
            train(told, until=time.monotonic() + 3600)
    assert end.value.code == code and handlers() == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert f"{NAMES[number]}: stopping after this step" in capfd.readouterr().err
    found, damaged = newest(tmp_path / "told" / "checkpoints")
    assert found.step == 3 and not damaged
    assert not (tmp_path / "told" / "final").exists()
    assert_same_runs(train(told, resume=True), uncut)


def test_a_signal_after_the_step_is_done_finds_a_checkpoint_of_it(pipeline, tiny_pairs, tmp_path, monkeypatch):
    """Whatever the loop has asked by then: here the question whether a checkpoint of step 3 is due."""
    real, calls = loop._Clock.stopped, []

    @contextlib.contextmanager
    def stopped(self):
        with real(self):
            yield
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop._Clock, "stopped", stopped)
    with pytest.raises(Stopped, match="after step 3, whose checkpoint is complete"):
        train(tiny_config(pipeline, tiny_pairs, tmp_path / "run"))
    assert newest(tmp_path / "run" / "checkpoints")[0].step == 3


def test_a_stop_does_not_change_where_the_guard_goes_back_to(pipeline, tiny_pairs, tmp_path, monkeypatch):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "uncut", max_steps=8, learning_rate=3e-3)
    config = replace(config, guard=replace(config.guard, action="rollback", share=1e-3, steps=3))
    config = replace(config, train=replace(config.train, checkpointing_steps=4))
    uncut, told = train(config), replace(config, output_dir=str(tmp_path / "told"))
    assert len({line["lr"] for line in logged(uncut)}) > 1  # it went back
    with monkeypatch.context() as patch:
        tell_at(patch, signal.SIGTERM, at=0)
        with pytest.raises(Stopped):
            train(told)
    assert newest(tmp_path / "told" / "checkpoints")[0].state["guard"]["good"] == 0
    assert_same_runs(train(told, resume=True), uncut)


def loud_scorer(folder, told_at: int):
    """A scorer that tells its process to stop when the images of one step are scored, and once only."""
    file = folder / "loud.py"
    file.write_text(
        "import os, signal\nimport numpy as np\nfrom pathlib import Path\n"
        "class Loud:\n"
        "    name, version = 'loud', '1'\n"
        "    def __call__(self, images, prompts):\n"
        f"        count = Path({str(folder / 'calls')!r})\n"
        "        count.write_text((count.read_text() if count.exists() else '') + 'x')\n"
        f"        if len(count.read_text()) == {told_at} and not Path({str(folder / 'quiet')!r}).exists():\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return [float(np.asarray(image).mean()) for image in images]\n"
        "def load(device):\n    return Loud()\n"
    )
    return str(file)


@pytest.mark.parametrize(("look", "step"), [(1, None), (2, 2), (3, 4)])  # before the first step, within, at the end
def test_a_run_told_while_it_looks_stops_at_once_and_looks_again(pipeline, tiny_pairs, tmp_path, look, step):
    (tmp_path / "prompts.txt").write_text("a large red circle\na small blue cross\n")
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "uncut", max_steps=4, ema=True, ema_decay=0.5)
    watch = replace(config.validation, prompts=str(tmp_path / "prompts.txt"), steps=2)
    watch = replace(watch, scorer=loud_scorer(tmp_path, look))
    config = replace(config, validation=watch, data=replace(config.data, holdout=0.3))
    told = replace(config, output_dir=str(tmp_path / "told"))
    with pytest.raises(Stopped) as end:
        train(told)
    assert ("while starting" if step is None else f"after step {step}") in str(end.value)
    found, _ = newest(tmp_path / "told" / "checkpoints")
    assert (None if found is None else (found.step, found.state["looked"])) == (step and (step, False))
    resumed = train(told, resume=True)
    (tmp_path / "quiet").touch()
    uncut = train(config)
    assert_same_runs(resumed, uncut)
    assert RunFolder(resumed).best() == RunFolder(uncut).best() is not None


@pytest.mark.parametrize("place", ["open_preferences", "load_backbone", "calibrated_objective"])
def test_a_run_told_before_its_first_step_ends_at_once(pipeline, tiny_pairs, tmp_path, monkeypatch, place):
    def tell(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # the signal cuts this

    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run")
    config = replace(config, objective=replace(config.objective, beta="auto"))
    before = handlers()
    with monkeypatch.context() as patch:
        patch.setattr(loop, place, tell)
        with pytest.raises(Stopped, match="stopped by SIGTERM while starting") as end:
            train(config)
    assert end.value.code == 143 and handlers() == before
    assert train(config, resume=True).joinpath("final").is_dir()


def test_time_that_is_over_ends_a_run_before_it_starts(pipeline, tiny_pairs, tmp_path):
    before = handlers()
    with pytest.raises(Stopped, match="stopped by --max-time while starting") as end:
        train(tiny_config(pipeline, tiny_pairs, tmp_path / "run"), until=time.monotonic() - 1)
    assert end.value.code == 0 and handlers() == before


def test_a_thread_trains_without_listening(pipeline, tiny_pairs, tmp_path):
    """Only the main thread can: handlers stay as they are, and the run is an ordinary one."""
    before, seen = handlers(), []
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=1)
    thread = threading.Thread(target=lambda: seen.append(train(config)))
    thread.start()
    thread.join()
    assert seen == [tmp_path / "run"] and handlers() == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop, stop.noted():
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.agreed
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.agreed and stop.wanted == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(stopping, "_die", ended.append)
    clock = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    with Stop() as stop, stop.noted():
        for after, number in ((0, signal.SIGUSR1), (5, signal.SIGTERM), (0.9, signal.SIGTERM)):
            clock[0] += after  # notice, the signal itself, and the same one passed on by a launcher
            os.kill(os.getpid(), number)
            assert ended == []
        clock[0] += 0.2
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT] and stop.wanted == signal.SIGUSR1


def test_a_process_dies_of_its_second_signal():
    program = (
        "import os, signal, time\nfrom diffpref.train import stopping\nstopping.ONE_REQUEST = 0.0\n"
        "with stopping.Stop() as stop, stop.noted():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('alive')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "")
    assert "SIGTERM: stopping after this step; a second signal stops at once" in ended.stderr


def test_a_signal_between_looking_and_the_step_is_not_lost():
    with Stop() as stop, stop.noted():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("it was told before")
