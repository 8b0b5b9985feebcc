"""What the launcher asks for: which strategy a run gets, what is refused, and the files that come with diffpref."""

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from support.runs import metrics, tiny_config
from support.together import SRC

from diffpref.cli.launch_config import FILES, FOLDER, main
from diffpref.errors import UserError
from diffpref.sharding import exchange, local, put, rejoined, split, whole, wholes
from diffpref.train.config import TrainConfig
from diffpref.train.config_file import to_yaml
from diffpref.train.loop import train
from diffpref.train.strategy import Replicated, make_strategy
from diffpref.train.zero import Zero, stage_asked

SCRIPT = FOLDER / "train.sbatch"


def accelerator(processes: int = 2) -> Any:
    return Mock(spec=Accelerator, num_processes=processes)


@pytest.fixture
def fsdp2(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")


def test_without_a_launcher_the_network_is_whole(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert isinstance(make_strategy(accelerator(), TrainConfig()), Replicated)


def test_a_single_process_has_nothing_to_split(fsdp2):
    assert isinstance(make_strategy(accelerator(1), TrainConfig()), Replicated)


def test_zero_is_asked_for_once_and_hidden_from_accelerate(monkeypatch):
    assert stage_asked() is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    assert stage_asked() == 1
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


@pytest.mark.parametrize(
    ("environment", "settings", "says"),
    [
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "train.gradient-checkpointing"),
        ({}, {"mixed_precision": "fp16"}, "train.mixed_precision"),
        ({}, {"channels_last": True}, "train.channels_last"),
        ({}, {"reference_cache": 2}, "train.reference_cache"),
        ({}, {"optimizer": "adafactor"}, "adamw, schedule_free"),
        ({}, {"optimizer": "adamw8bit"}, "train.optimizer"),
    ],
)
def test_what_fsdp2_cannot_do_is_refused(fsdp2, monkeypatch, environment, settings, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        make_strategy(accelerator(), TrainConfig(**settings))


@pytest.mark.parametrize(
    ("stage", "environment", "settings", "says"),
    [
        (3, {}, {}, "FSDP2"),
        (2, {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "offload_optimizer_device"),
        (2, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, {}, "deepspeed_config_file"),
        (1, {}, {"mixed_precision": "fp16"}, "train.mixed_precision"),
        (1, {}, {"optimizer": "schedule_free"}, "use adamw"),
    ],
)
def test_what_zero_cannot_do_is_refused(monkeypatch, stage, environment, settings, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        make_strategy(accelerator(), TrainConfig(**settings), stage)


def test_zero_needs_deepspeed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else object())
    with pytest.raises(UserError, match="pip install deepspeed"):
        make_strategy(accelerator(), TrainConfig(), 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert isinstance(make_strategy(accelerator(), TrainConfig(), 2), Zero)


def test_plain_tensors_pass_through():
    value, place = torch.arange(3.0), torch.zeros(3)
    assert all(each is value for each in (local(value), whole(value), wholes(value), split(value, place)))
    assert rejoined({"a": value}, {"a": place})["a"] is value
    assert wholes({"a": [value, 1], "b": (2, "c")}) == {"a": [value, 1], "b": (2, "c")}
    put(value, place)
    assert place.tolist() == [0, 1, 2]
    other = torch.full((3,), 7.0)
    exchange(place, other)
    assert (place.tolist(), other.tolist()) == ([7, 7, 7], [0, 1, 2])


@pytest.mark.parametrize("name", [name for name, (file, _) in FILES.items() if file.endswith(".yaml")])
def test_accelerate_reads_the_files(name, capsys):
    main([name])
    path = capsys.readouterr().out.strip()
    config = load_config_from_file(path)
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED"}
    assert config.distributed_type == expected[name]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_launch_config_names_what_there_is(capsys):
    main([])
    told = capsys.readouterr().out
    assert all(name in told for name in FILES)
    assert {file for file, _ in FILES.values()} == {path.name for path in FOLDER.iterdir()}
    for wrong, says in (["fsdp"], "fsdp2"), (["zero3"], "fsdp2"), (["ddp", "fsdp2"], "one name"):
        with pytest.raises(UserError, match=says):
            main(wrong)


@pytest.fixture
def slurm(tmp_path):
    """Runs the job's script among commands that only note their arguments; `accelerate` does what it is told to."""

    def run(accelerate: str, signal: bool = False) -> tuple[int, list[str]]:
        log, run = tmp_path / "log", tmp_path / "run"
        run.mkdir()
        commands = {
            "scontrol": f'echo "scontrol $*" >> {log}; [ "$1" = show ] && echo node0',
            "diffpref": f"echo {FOLDER}/$2.yaml",
            "srun": 'shift; export SLURM_NODEID=1; exec "$@"',
            "scancel": f'echo "scancel $*" >> {log}; kill -TERM $(cat {tmp_path}/pid)',
            "accelerate": f'echo "accelerate $*" >> {log}; echo $$ > {tmp_path}/pid; {accelerate}',
        }
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, body in commands.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(stat.S_IRWXU)
        text = SCRIPT.read_text().replace("/shared/runs/sd15-dpo", str(run))
        (tmp_path / "job").write_text(text)
        environment = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2"}
        environment |= {"SLURM_CPUS_PER_TASK": "64", "PATH": f"{folder}:{os.environ['PATH']}"}
        job = subprocess.Popen(["bash", str(tmp_path / "job")], env=environment)
        if signal:
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                time.sleep(0.01)
            job.send_signal(10)
        return job.wait(timeout=30), log.read_text().splitlines()

    return run


def test_the_slurm_script_starts_a_launcher_a_node(slurm, tmp_path):
    code, said = slurm(f"touch {tmp_path}/run/report.html")
    assert code == 0
    started = next(line for line in said if line.startswith("accelerate"))
    assert "--num_machines 2 --machine_rank 1 --num_processes 16 --main_process_ip node0 --main_process_port" in started
    assert "-m diffpref train sd15-dpo --data.path /shared/data/pairs --data.cache" in started
    assert started.endswith(f"--output-dir {tmp_path}/run --resume --max-time 23h45m")
    assert f"--config_file {FOLDER}/ddp.yaml" in started
    assert not any("requeue" in line for line in said)  # it is finished


def test_the_slurm_script_queues_itself_again_where_time_was_up(slurm):
    code, said = slurm("exit 0")
    assert code == 0
    assert said[-1] == "scontrol requeue 77"


def test_the_slurm_script_fails_as_the_run_does(slurm):
    code, said = slurm("exit 3")
    assert code == 3
    assert not any("requeue" in line for line in said)


def test_the_slurm_script_passes_the_end_of_its_time_on(slurm):
    code, said = slurm("trap 'exit 143' TERM; for i in $(seq 200); do sleep 0.1; done", signal=True)
    assert code == 0
    assert said[-2:] == ["scancel --signal=TERM 77", "scontrol requeue 77"]


def started(command: list[str], **environment: str) -> subprocess.Popen:
    path = os.pathsep.join([SRC, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def config_of(pipeline, tiny_pairs, tmp_path):
    return lambda name, batch: tiny_config(pipeline, tiny_pairs, tmp_path / name, max_steps=3, batch_size=batch)


def same_curve(one: Path, two: Path) -> bool:
    pairs = zip(metrics(one), metrics(two), strict=True)
    return all(a["loss"] == pytest.approx(b["loss"], abs=1e-5) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_launches_it(config_of, tmp_path, name):
    """With the file that comes with diffpref; on CPUs where it says GPUs."""
    file = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    file |= {"use_cpu": True, "num_processes": 2}
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(file))
    (tmp_path / "run.yaml").write_text(to_yaml(config_of("two", 2)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launch.yaml")]
    command += ["--main_process_port", str(free_port()), "-m", "diffpref", "train"]
    run = started([*command, "--config", str(tmp_path / "run.yaml")])
    out, said = run.communicate(timeout=300)
    assert run.returncode == 0, said[-3000:]
    assert out.splitlines() == [str(tmp_path / "two")]  # the main process alone says it
    assert same_curve(train(config_of("one", 4)), tmp_path / "two")


@pytest.mark.slow
def test_two_launchers_find_each_other(config_of, tmp_path):
    """As on two machines, each with a process of its own."""
    (tmp_path / "run.yaml").write_text(to_yaml(config_of("two", 2)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", f"localhost:{free_port()}"]
    command += ["-m", "diffpref", "train", "--config", str(tmp_path / "run.yaml")]
    runs = [started(command) for _ in range(2)]
    told = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert sorted(out for out, _ in told) == ["", f"{tmp_path / 'two'}\n"]
    assert same_curve(train(config_of("one", 4)), tmp_path / "two")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]
