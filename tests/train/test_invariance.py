"""Equivalent settings share one loss curve: one process, two, or weights split over two; and no matter how split."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from support.runs import finals, metrics, tiny_config, with_lora
from support.tiny import make_pairs, write_pairs
from support.together import Job, launch, resave

from diffpref.objectives import DRO
from diffpref.points import Inverted, Replay
from diffpref.train.config import Config, ValidationConfig
from diffpref.train.loop import train

STEPS = 20


def curve(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def norms(run: Path) -> list[float]:
    return [line["grad_norm"] for line in metrics(run)]


def distance(one: Path, two: Path) -> float:
    """The mean absolute difference of two runs' final weights, which a step of 1e-3 moved by about as much.

    Not the largest: where a gradient is all but zero, its last bit decides which way AdamW goes.
    """
    pairs = list(zip(finals(one), finals(two), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return torch.cat([(a - b).abs().flatten() for a, b in pairs]).mean().item()


def same(one: Path, two: Path) -> bool:
    """Whether two safetensors files hold the same tensors bit for bit, and more than zeros."""
    a, b = load_file(one), load_file(two)
    assert any(value.any() for value in a.values())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def looks(run: Path) -> list[dict]:
    """What a run logged when it looked at held-out pairs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "heldout_loss" in line]


def fresh() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("invariance")


@pytest.fixture(scope="module")
def settings(pipeline, tiny_pairs, folder):
    def build(name: str, **train) -> Config:
        train = {"max_steps": 4, "checkpointing_steps": 0, **train}
        config = tiny_config(pipeline, tiny_pairs, folder / name, **train)
        return replace(config, data=replace(config.data, holdout=0.2))

    return build


def replayed(config: Config) -> Config:
    """DRO with trajectories that are kept, sampled with weights that were copied; not all places sample at a step."""
    points = Replay(sampler="ddim", steps=3, trajectories=2, refresh_steps=2, policy_copy_steps=3)
    return replace(config, objective=DRO(margin=0.1), points=points)


def sampled(config: Config) -> Config:
    """DRO as published: each item's own new trajectory, sampled to the step drawn for it and no further."""
    return replace(config, objective=DRO(margin=0.1), points=Replay(sampler="ddim", steps=5))


@pytest.fixture(scope="module")
def kinds(settings):
    """By name, what makes the configuration of a run with `batch` items a micro-batch, 8 a step and process x batch."""
    look = ValidationConfig(steps=2, prompts="embedded", images=2, num_inference_steps=2)
    return {
        "dpo": lambda name, batch: settings(name, batch_size=batch, max_steps=STEPS),
        "replay": lambda name, batch: replayed(settings(name, batch_size=batch, max_steps=5, checkpointing_steps=5)),
        "whole": lambda name, batch: replace(
            settings(name, batch_size=batch // 2, gradient_accumulation_steps=2, ema=True, checkpointing_steps=2),
            validation=look,
        ),
        "lora": lambda name, batch: with_lora(settings(name, batch_size=batch, max_steps=3)),
        "sampled": lambda name, batch: sampled(settings(name, batch_size=batch, max_steps=2)),
    }


@pytest.fixture(scope="module")
def alone(kinds):
    """By name, the run of one process; made when it is first asked for."""
    made = {}

    def run(name: str) -> Path:
        if name not in made:
            fresh()
            made[name] = train(kinds[name](f"alone-{name}", 8))
        return made[name]

    return run


@pytest.fixture(scope="module")
def together(kinds, alone, folder):
    """The folder of runs of two processes: `two-NAME`, and `split-NAME` with split weights."""
    shutil.copytree(alone("whole"), folder / "again")
    again = kinds["whole"]("again", 4)
    (folder / "again" / "config.yaml").unlink()
    jobs = [Job(kinds[name](f"two-{name}", 4)) for name in ("dpo", "replay")]
    jobs += [Job(kinds[name](f"split-{name}", 4), fsdp2=True) for name in ("whole", "lora", "replay", "sampled")]
    launch([*jobs, Job(again, fsdp2=True, resave=True)], 2, folder / "jobs")
    return folder


def test_accumulation_changes_nothing(settings, alone):
    split = train(settings("accumulated", batch_size=4, gradient_accumulation_steps=2, max_steps=STEPS))
    whole = curve(alone("dpo"))
    assert len(whole) == STEPS
    assert curve(split) == pytest.approx(whole, abs=1e-5)
    assert max(whole) - min(whole) > 1e-3


@pytest.mark.parametrize("name", ["dpo", "replay"])
def test_two_processes_change_nothing(together, alone, name):
    assert curve(together / f"two-{name}") == pytest.approx(curve(alone(name)), abs=1e-5)
    assert norms(together / f"two-{name}") == pytest.approx(norms(alone(name)), rel=1e-3, abs=1e-5)
    if name == "replay":
        assert (together / "two-replay" / "checkpoints" / "step-5" / "points.safetensors").is_file()


@pytest.mark.parametrize("name", ["whole", "lora", "replay", "sampled"])
def test_split_weights_change_nothing(together, alone, name):
    one, two = alone(name), together / f"split-{name}"
    assert curve(two) == pytest.approx(curve(one), abs=1e-5)
    assert norms(two) == pytest.approx(norms(one), rel=1e-3, abs=1e-5)
    assert max(curve(one)) - min(curve(one)) > 1e-6
    assert distance(one, two) < 1e-6


def test_split_weights_are_looked_at_as_whole_ones(together, alone):
    one, two = looks(alone("whole")), looks(together / "split-whole")
    assert [line["step"] for line in two] == [0, 2, 4]
    for key in ("heldout_loss", "heldout_accuracy"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], abs=1e-5)
    assert len(list((together / "split-whole" / "samples" / "step-4").glob("*.png"))) == 2


def test_a_checkpoint_of_one_process_is_the_same_after_a_visit_to_two(together, alone):
    before, after = alone("whole") / "checkpoints" / "step-4", together / "again" / "checkpoints" / "step-4"
    for part in ("weights", "optimizer", "ema"):
        assert same(before / f"{part}.safetensors", after / f"{part}.safetensors")


def test_a_checkpoint_of_split_weights_goes_on_in_one_process(together, kinds, folder):
    """Written again by one process it is the same bit for bit, and its steps are those of the split run."""
    for name in ("saved-again", "gone-on"):
        shutil.copytree(together / "split-whole", folder / name)
        (folder / name / "config.yaml").unlink()
    resave(kinds["whole"]("saved-again", 8))
    before, after = (folder / name / "checkpoints" / "step-4" for name in ("split-whole", "saved-again"))
    for part in ("weights", "optimizer", "ema"):
        assert same(before / f"{part}.safetensors", after / f"{part}.safetensors")
    fresh()
    shutil.rmtree(folder / "gone-on" / "checkpoints" / "step-4")
    run = train(kinds["whole"]("gone-on", 8), resume=True)
    assert curve(run) == pytest.approx(curve(together / "split-whole"), abs=1e-5)
    assert distance(run, folder / "split-whole") < 1e-6


@pytest.mark.slow
def test_split_weights_with_everything_else(settings, folder):
    """The other things that keep tensors or go forward in their own way."""
    kinds = {
        "moving": lambda name, batch: settings(name, batch_size=batch, reference_decay=0.9, checkpointing_steps=2),
        "schedule-free": lambda name, batch: settings(name, batch_size=batch, optimizer="schedule_free"),
        "checkpointing": lambda name, batch: settings(name, batch_size=batch, gradient_checkpointing=True),
        "inverted": lambda name, batch: replace(settings(name, batch_size=batch), points=Inverted()),
    }
    launch([Job(make(f"split-{name}", 4), fsdp2=True) for name, make in kinds.items()], 2, folder / "more")
    for name, make in kinds.items():
        fresh()
        run = train(make(f"alone-{name}", 8))
        assert curve(folder / f"split-{name}") == pytest.approx(curve(run), abs=2e-5)
        assert distance(run, folder / f"split-{name}") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_changes_nothing(kinds, alone, folder, stage):
    """Runs of two processes under DeepSpeed, and checkpoints from one process to these and back, bit for bit."""
    pytest.importorskip("deepspeed")
    visitor, parts = folder / f"visit-{stage}", ("weights", "optimizer", "ema")
    shutil.copytree(alone("whole"), visitor)
    (visitor / "config.yaml").unlink()
    jobs = [Job(kinds[name](f"zero{stage}-{name}", 4), zero=stage) for name in ("whole", "lora", "replay")]
    jobs.append(Job(kinds["whole"](visitor.name, 4), zero=stage, resave=True))
    launch(jobs, 2, folder / f"zero{stage}", DS_ACCELERATOR="cpu")
    for name in ("whole", "lora", "replay"):
        one, two = alone(name), folder / f"zero{stage}-{name}"
        assert curve(two) == pytest.approx(curve(one), abs=1e-5)
        assert norms(two) == pytest.approx(norms(one), rel=1e-3, abs=1e-5)
        assert distance(one, two) < 1e-6
    before, after = (run / "checkpoints" / "step-4" for run in (alone("whole"), visitor))
    assert all(same(before / f"{part}.safetensors", after / f"{part}.safetensors") for part in parts)
    shutil.copytree(folder / f"zero{stage}-whole", folder / f"back-{stage}")
    (folder / f"back-{stage}" / "config.yaml").unlink()
    resave(kinds["whole"](f"back-{stage}", 8))
    before, after = (folder / name / "checkpoints" / "step-4" for name in (f"zero{stage}-whole", f"back-{stage}"))
    assert all(same(before / f"{part}.safetensors", after / f"{part}.safetensors") for part in parts)


@pytest.mark.slow
def test_gradients_that_are_not_finite_are_dropped(settings, folder):
    """Every third step has an item whose weight is too large; the steps between are those of a run of one process."""
    pairs = write_pairs(folder / "heavy", make_pairs(24, weight=[3e38 if number == 5 else 1.0 for number in range(24)]))

    def config(name: str, batch: int) -> Config:
        chosen = settings(name, batch_size=batch, max_steps=6)
        return replace(chosen, data=replace(chosen.data, path=str(pairs), cache=f"{pairs}.cache", holdout=0.0))

    names = {"heavy-split": Job(config("heavy-split", 4), fsdp2=True)}
    if importlib.util.find_spec("deepspeed"):
        names |= {f"heavy-zero{stage}": Job(config(f"heavy-zero{stage}", 4), zero=stage) for stage in (1, 2)}
    launch(list(names.values()), 2, folder / "heavy-jobs", DS_ACCELERATOR="cpu")
    fresh()
    alone = metrics(train(config("heavy-alone", 8)))
    assert [line["steps_skipped"] for line in alone][-1] == 2
    for name in names:
        lines = metrics(folder / name)
        assert [line["steps_skipped"] for line in lines] == [line["steps_skipped"] for line in alone]
        # what is left of the first applied gradient is small, and its last bits tell some weights where to go
        assert curve(folder / name) == pytest.approx([line["loss"] for line in alone], abs=2e-4)
        assert distance(folder / "heavy-alone", folder / name) < 1e-5


# Learning rates. At ten times these, rounding alone comes to 1.4e-6: beta 100 makes much of the last bit of an error.
FIFTY = {"dpo": 1e-5, "lora": 1e-4, "sampled": 1e-4}


@pytest.mark.slow
def test_fifty_steps_of_one_two_and_four_processes(settings, folder):
    """The same samples and losses within 1e-6, from the first step to the fiftieth."""

    def config(name: str, kind: str, batch: int) -> Config:
        chosen = settings(name, batch_size=batch, max_steps=50, learning_rate=FIFTY[kind])
        return {"dpo": lambda it: it, "lora": with_lora, "sampled": sampled}[kind](chosen)

    for processes in (2, 4):
        jobs = [Job(config(f"fifty{processes}-{kind}", kind, 8 // processes)) for kind in FIFTY]
        launch(jobs, processes, folder / f"fifty{processes}")
    jobs = [Job(config(f"fifty-split-{kind}", kind, 4), fsdp2=True) for kind in FIFTY]
    launch(jobs, 2, folder / "fifty-split", timeout=1200)
    for kind in FIFTY:
        fresh()
        whole = curve(train(config(f"fifty1-{kind}", kind, 8)))
        assert len(whole) == 50
        assert max(whole) - min(whole) > 1e-4
        for other in ("fifty2", "fifty4", "fifty-split"):
            assert curve(folder / f"{other}-{kind}") == pytest.approx(whole, abs=1e-6), (other, kind)
