"""A process of a run dies or hangs: the others end with one line and no success, and none outlives its launcher."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.runs import metrics as metrics_of
from support.runs import tiny_config

from diffpref.train import processes
from diffpref.train.config_file import to_yaml
from diffpref.train.loop import train

ROOT = Path(__file__).parents[2]
BASE = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def two(arguments: list[str]) -> list[subprocess.Popen]:
    """Two processes as torchrun starts them, without a torchrun that could end them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = BASE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def until(reached, seconds: float = 120.0) -> float:
    """How long it took."""
    started = time.monotonic()
    while not reached():
        assert time.monotonic() - started < seconds
        time.sleep(0.02)
    return time.monotonic() - started


def test_one_that_is_killed_ends_the_other():
    ours, other = two([str(ROOT / "tests" / "support" / "waiting.py"), "60"])
    try:
        assert ours.stdout.readline() == other.stdout.readline() == "ready\n"
        time.sleep(0.2)
        other.kill()
        _, said = ours.communicate(timeout=30)  # not the 60 s of a hung one
    finally:
        for process in (ours, other):
            process.kill()
    assert ours.returncode == 1
    assert re.fullmatch(
        r"diffpref: process 0 of 2 ends, for another one has died, or was silent for 60 s \(train\.process_timeout\): "
        r"[^;]*peer[^;]*; see what the others said, then add --resume\n",
        said,
    )


def test_errors_of_one_process_alone_are_its_own():
    assert processes.lost(RuntimeError("gloo: Connection closed by peer"), 1.0) is None


def test_the_timeout_is_accelerates(monkeypatch, pipeline, tiny_pairs, tmp_path):
    seen = []
    monkeypatch.setattr("diffpref.train.loop.Accelerator", lambda **given: seen.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny_config(pipeline, tiny_pairs, tmp_path / "run", process_timeout=7.0))
    assert seen[0]["kwargs_handlers"][0].timeout.total_seconds() == 7.0


ORPHAN = """
import subprocess, sys, time
worker = '''
import time
from diffpref.train import processes
processes.end_with_launcher()
print("up", flush=True)
time.sleep(600)
'''
print(subprocess.Popen([sys.executable, "-c", worker]).pid, flush=True)
time.sleep(600)
"""


def test_a_process_ends_with_torchrun_but_not_with_a_shell():
    settings = [BASE | {"TORCHELASTIC_RUN_ID": "x"}, BASE]
    launchers = [
        subprocess.Popen([sys.executable, "-c", ORPHAN], env=each, stdout=subprocess.PIPE, text=True)
        for each in settings
    ]
    orphan, other = (int(launcher.stdout.readline()) for launcher in launchers)
    try:
        for launcher in launchers:
            assert launcher.stdout.readline() == "up\n"
            launcher.kill()
            launcher.wait()
        until(lambda: not lives(orphan), 10)
        time.sleep(3 * processes.LOOK)
        assert lives(other)
    finally:
        for process in filter(lives, (orphan, other)):
            os.kill(process, signal.SIGKILL)


def lives(process: int) -> bool:
    """Whether it runs: an ended one that nobody waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def run(pipeline, tiny_pairs, tmp_path):
    """The command line of a run without end, and its metrics."""
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=10**6, checkpointing_steps=0)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    return ["train", "--config", str(tmp_path / "config.yaml")], tmp_path / "run" / "metrics.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_in_the_middle_of_training_ends_the_other_within_five_seconds(run, victim):
    arguments, metrics = run
    ranks = two(["-m", "diffpref", *arguments])
    try:
        until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3)
        ranks[victim].kill()
        other = ranks[1 - victim]
        assert until(lambda: other.poll() is not None, 30) < 5
        said = other.stderr.read()
    finally:
        for rank in ranks:
            rank.kill()
    assert other.returncode == 1
    assert said.splitlines()[-1].startswith(f"diffpref: process {1 - victim} of 2 ends, for another one has died")
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_other_within_its_timeout(run):
    arguments, metrics = run
    ranks = two(["-m", "diffpref", *arguments, "--train.process-timeout", "8"])
    try:
        until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3)
        ranks[1].send_signal(signal.SIGSTOP)
        assert 5 < until(lambda: ranks[0].poll() is not None, 60) < 15
        said = ranks[0].stderr.read()
        ranks[1].send_signal(signal.SIGCONT)
        assert until(lambda: ranks[1].poll() is not None, 30) < 5
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "was silent for 8 s (train.process_timeout): Timed out waiting 8000ms" in said.splitlines()[-1]


@pytest.mark.slow
def test_ranks_agree_on_the_micro_batch_that_fits_in_each(pipeline, tiny_pairs, tmp_path):
    sizes = {"max_steps": 3, "batch_size": 2, "gradient_accumulation_steps": 4}
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", **sizes)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    small = [str(ROOT / "tests" / "support" / "small.py"), "8,5"]  # of pairs, four and two
    ranks = two([*small, "train", "--config", str(tmp_path / "config.yaml"), "--train.micro-batch", "auto"])
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "train.micro_batch: auto is 2 of 8 items at once" in said[0]
    alone = train(replace(config, output_dir=str(tmp_path / "alone"), train=replace(config.train, batch_size=4)))
    ours, theirs = ([line["loss"] for line in metrics_of(run)] for run in (tmp_path / "run", alone))
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.slow
def test_a_rank_that_is_out_of_memory_says_what_helps_and_ends_the_others(pipeline, tiny_pairs, tmp_path):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", batch_size=4)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    small = [str(ROOT / "tests" / "support" / "small.py"), "99,4"]
    ranks = two([*small, "train", "--config", str(tmp_path / "config.yaml")])
    said = [rank.communicate(timeout=120)[1].splitlines()[-1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert said[0].startswith("diffpref: process 0 of 2 ends, for another one has died")
    assert said[1].startswith("diffpref: out of memory in step 1, with 4 pairs at once (train.batch_size 4 x ")
    assert "what helps most: train.micro_batch 2 " in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "rank"])
def test_under_torchrun_nothing_is_left(run, victim):
    arguments, metrics = run
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launcher = subprocess.Popen(
        [*torchrun, "-m", "diffpref", *arguments], env=BASE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ranks: list[int] = []
    try:
        until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ranks = [int(child) for child in children]
        assert len(ranks) == 2
        os.kill(launcher.pid if victim == "launcher" else ranks[1], signal.SIGKILL)
        until(lambda: not any(map(lives, ranks)) and launcher.poll() is not None, 60)
        assert launcher.returncode != 0
    finally:
        launcher.kill()
        for rank in filter(lives, ranks):
            os.kill(rank, signal.SIGKILL)


def test_a_world_of_two_with_another_error_is_left_alone(monkeypatch):
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert processes.lost(RuntimeError("shapes cannot be multiplied"), 5.0) is None
    gone = processes.lost(torch.distributed.DistNetworkError("[x.cc:3] The client socket has timed out. More"), 5.0)
    assert "process 1 of 2 ends" in str(gone) and "The client socket has timed out;" in str(gone)
