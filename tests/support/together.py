"""Runs of several processes, started once for all of them: `launch` from a test, and what it starts.

Starting a process takes longer than the runs themselves.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from diffpref.train.config import Config
from diffpref.train.config_file import from_yaml, to_yaml

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as accelerate's launcher sets it
SRC = str(Path(__file__).parents[2] / "src")


@dataclass(frozen=True)
class Job:
    """A run, and what of the environment is the launcher's to set.

    resave: instead of training, take the newest checkpoint up and write it again.
    """

    config: Config
    fsdp2: bool = False
    zero: int | None = None
    resume: bool = False
    resave: bool = False


def launch(jobs: list[Job], processes: int, folder: Path, timeout: int = 600, **environment: str) -> str:
    """Make the runs one after the other in the same processes; what they said. Fails where one of them does."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, job in enumerate(jobs):
        file = folder / f"{number}.yaml"
        file.write_text(to_yaml(job.config))
        listed.append(
            {"config": str(file), "fsdp2": job.fsdp2, "zero": job.zero, "resume": job.resume, "resave": job.resave}
        )
    (folder / "jobs.json").write_text(json.dumps(listed))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    path = os.pathsep.join([SRC, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(Path(__file__)), str(folder / "jobs.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


def resave(config: Config) -> None:
    """Take the newest checkpoint of a run up, as `train` does, and write it again in its place."""
    import torch
    from accelerate import Accelerator

    from diffpref.models.loading import load_backbone
    from diffpref.train.optimizers import make_optimizer
    from diffpref.train.placing import make_placer
    from diffpref.train.run_folder import RunFolder
    from diffpref.train.state import RunState
    from diffpref.train.strategy import make_strategy
    from diffpref.train.zero import stage_asked

    zero = stage_asked()
    accelerator = Accelerator(cpu=True)
    strategy = make_strategy(accelerator, config.train, zero)
    backbone = load_backbone(config.model, accelerator.device, torch.float32, trainable=True)
    with torch.no_grad():  # what is taken up must not be there already
        for parameter in backbone.net.parameters():
            parameter.zero_()
    _, optimizer, _ = strategy.prepare(backbone.net, lambda trained: make_optimizer(trained, config.train))
    place = make_placer(config.points, backbone, None, config.train, accelerator)
    run = RunFolder(Path(config.output_dir))
    state = RunState(config, run, accelerator, backbone, optimizer, place, gathers=strategy.gathers)
    state.resume()
    state.keep()
    state.finish()
    state.writer.close()


def main(file: str) -> None:
    """Make the runs of a file that `launch` wrote."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from diffpref.train.loop import train

    for job in json.loads(Path(file).read_text()):
        for name, value in FSDP2.items():
            os.environ.pop(name, None)
            if job["fsdp2"]:
                os.environ[name] = value
        if job["zero"]:
            os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(job["zero"])}
        config = from_yaml(Path(job["config"]), Config())
        if job["resave"]:
            resave(config)
        else:
            train(config, resume=job["resume"])
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


if __name__ == "__main__":
    main(sys.argv[1])
