"""`python -m support.forking JOBS`: run diffpref's command several times, each in processes forked from this one.

Importing torch takes longer than a tiny run; here it is done once. JOBS is a file with a list of objects: `arguments`
of the command, `processes`, `tell`: (rank, step) of the one that gets SIGTERM in the middle of that step, and `cut`: a
run folder, the step up to which its checkpoints are copied, and to where, before the command. Printed is a list with
the exit codes of each job.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from diffpref.train.kept import kept

ROOT = Path(__file__).parents[2]


def run_jobs(file: Path, jobs: list[dict]) -> list[list[int]]:
    """Write the jobs to a file and run them in a process of their own; their exit codes."""
    file.write_text(json.dumps(jobs))
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.forking", str(file)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    sys.stderr.write(ended.stderr)
    return json.loads(ended.stdout.splitlines()[-1])


def warm() -> None:
    """Import all that a run needs. Nothing is computed: a process with torch's threads in it is not to be forked."""
    import peft  # noqa: F401
    import torch
    from diffusers import StableDiffusionPipeline  # noqa: F401

    import diffpref.train.loop  # noqa: F401
    from diffpref.models.loading import load_backbone
    from diffpref.train.config import ModelConfig, TrainConfig
    from diffpref.train.optimizers import make_lr_schedule, make_optimizer

    net = load_backbone(ModelConfig(), torch.device("cpu"), torch.float32, trainable=True).net
    make_optimizer(list(net.parameters()), TrainConfig())
    make_lr_schedule(TrainConfig(), 1)


def fork(function: Callable[[], int]) -> int:
    """Call a function in a forked process, which ends with what it returns; the process's number."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    try:
        code = function()
    except BaseException:
        traceback.print_exc()
        code = 99
    os._exit(code)


def cut_run(run: Path, step: int, target: Path) -> None:
    """Copy a run as it would be if it had been killed just after the checkpoint of a step."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "final", ignore_errors=True)
    for found in kept(target / "checkpoints"):
        if found.step > step:
            shutil.rmtree(found.path)


def _together(job: dict) -> list[int]:
    if "cut" in job:
        run, step, target = job["cut"]
        cut_run(Path(run), step, Path(target))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [fork(partial(_one, job, rank, port)) for rank in range(job["processes"])]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _one(job: dict, rank: int, port: int) -> int:
    import torch

    from diffpref.__main__ import main
    from diffpref.train.step import Learner

    os.dup2(2, 1)  # what the command prints is none of ours
    torch.set_num_threads(1)
    if job["processes"] > 1:
        size = str(job["processes"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if job.get("tell", [None])[0] == rank:
        real = Learner.look

        def look(self: Learner, step: int, micro: int) -> object:
            if (step, micro) == (job["tell"][1], 0):
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, step, micro)

        Learner.look = look
    return main(job["arguments"])


if __name__ == "__main__":
    warm()
    print(json.dumps([_together(job) for job in json.loads(Path(sys.argv[1]).read_text())]))
