"""Several processes: a checkpoint of two resumes on one and on four, and a signal to one of them stops all."""

from dataclasses import replace

import pytest
import torch
from support.forking import run_jobs
from support.runs import logged, metrics, tiny_config

from diffpref.objectives import DRO
from diffpref.points import Replay
from diffpref.train.checkpoint import newest
from diffpref.train.config_file import to_yaml

STEPS, CUT = 6, 3


def configured(pipeline, tiny_pairs, folder, processes: int, replay: bool):
    config = tiny_config(pipeline, tiny_pairs, folder, batch_size=4 // processes, max_steps=STEPS, ema=True)
    config = replace(config, train=replace(config.train, checkpointing_steps=CUT, ema_decay=0.5))
    if replay:
        points = Replay(sampler="ddim", steps=3, trajectories=2, refresh_steps=2, policy_copy_steps=2)
        config = replace(config, objective=DRO(), points=points)
    return config


def job(config, file, processes: int, *arguments: str, **more) -> dict:
    file.write_text(to_yaml(config))
    return {"arguments": ["train", "--config", str(file), *arguments], "processes": processes, **more}


def assert_near(one, other) -> None:
    """Checkpoints of the same step whose tensors agree, but for the order in which processes' gradients are added."""
    assert one.step == other.step
    for name, found in {"weights": one.weights, "optimizer": one.optimizer, **one.extra}.items():
        expected = getattr(other, name, None) or other.extra[name]
        assert found.keys() == expected.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def ran(pipeline, tiny_pairs, tmp_path_factory):
    """Runs by kind and name: on two processes, then from their middle on one and on four; one that was told to stop."""
    folder = tmp_path_factory.mktemp("processes")
    runs, jobs, wanted = {}, [], []
    for kind in ("dpo", "dro"):
        for count in (2, 1, 4):
            runs[kind, count] = folder / f"{kind}-{count}"
            config = configured(pipeline, tiny_pairs, runs[kind, count], count, kind == "dro")
            resumed = ["--resume"] if count != 2 else []
            cut = {"cut": [str(runs[kind, 2]), CUT, str(runs[kind, count])]} if resumed else {}
            jobs.append(job(config, folder / f"{kind}-{count}.yaml", count, *resumed, **cut))
            wanted.append([0] * count)
    config = configured(pipeline, tiny_pairs, folder / "told", 2, replay=False)
    jobs.append(job(config, folder / "told.yaml", 2, tell=[1, 1]))
    runs["told"] = folder / "cut"  # what it leaves is looked at, and a copy of it goes on
    config = replace(config, output_dir=str(runs["told"]))
    jobs.append(job(config, folder / "cut.yaml", 2, "--resume", cut=[str(folder / "told"), STEPS, str(runs["told"])]))
    assert run_jobs(folder / "jobs.json", jobs) == [*wanted, [143, 143], [0, 0]]
    return runs


@pytest.mark.parametrize("kind", ["dpo", "dro"])
@pytest.mark.parametrize("count", [1, 4])
def test_a_checkpoint_of_two_processes_resumes_on_others(ran, kind, count):
    whole, found = (newest(ran[kind, each] / "checkpoints")[0] for each in (2, count))
    assert whole.step == STEPS and ("points" in whole.extra) == (kind == "dro")
    assert_near(found, whole)
    assert (found.state["processes"], found.state["items_per_step"]) == (count, 4)
    lines = [metrics(ran[kind, each]) for each in (count, 2)]
    for key in ("loss", "policy_error_chosen", "grad_norm"):
        values = [[line[key] for line in each] for each in lines]
        assert values[0] == pytest.approx(values[1], rel=3e-6, abs=1e-5) and len(values[0]) == STEPS
    assert len({line["policy_error_chosen"] for line in lines[1]}) == STEPS


def test_a_signal_to_one_process_stops_all_after_the_same_step(ran):
    """It came when the step had begun; all of them took the next step and stopped. What goes on is the uncut run."""
    told = ran["told"].with_name("told")
    found, damaged = newest(told / "checkpoints")
    assert found.step == 3 and not damaged and len(metrics(told)) == 3
    ends = [newest(run / "checkpoints")[0] for run in (ran["told"], ran["dpo", 2])]
    assert all(torch.equal(value, ends[1].weights[name]) for name, value in ends[0].weights.items())
    assert logged(ran["told"]) == logged(ran["dpo", 2])
