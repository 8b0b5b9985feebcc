"""What a checkpoint holds comes back exactly, for each optimizer; which checkpoints stay."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffpref.train import checkpoint
from diffpref.train.checkpoint import Host, at, capture, newest, restore, save
from diffpref.train.config import TrainConfig
from diffpref.train.ema import EMA
from diffpref.train.kept import superseded
from diffpref.train.optimizers import make_lr_schedule, make_optimizer, trained_parameters

WITHOUT_8BIT = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs the extra 8bit")
OPTIMIZERS = ["adamw", "adafactor", "schedule_free", pytest.param("adamw8bit", marks=WITHOUT_8BIT)]
STEPS = 8


def make_net(seed: int = 0) -> torch.nn.Module:
    """A convolution, a matrix that 8-bit optimizers compress, vectors, and frozen weights."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(64, 80), torch.nn.Linear(80, 3)
    )
    net[3].requires_grad_(False)
    return net


class Run:
    """Training in small: everything that a checkpoint must bring back."""

    def __init__(self, name: str, seed: int = 0) -> None:
        train = TrainConfig(optimizer=name, learning_rate=1e-2, lr_warmup_steps=3)
        self.net = make_net(seed)
        self.optimizer = make_optimizer(list(trained_parameters(self.net).values()), train)
        self.ema, self.rate = EMA(self.net, 0.8), make_lr_schedule(train, 1)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            images = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(step))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            self.net(images).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.net, step + 1)

    def capture(self, step: int) -> checkpoint.Checkpoint:
        return capture(step, self.net, self.optimizer, {}, {"ema": self.ema.state()})


def assert_same(found: object, expected: object) -> None:
    """Equal in value and in type, tensors bit for bit."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("cut", [0, 1, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_uncut_one(name, cut, tmp_path):
    uncut = Run(name)
    uncut.train(0, cut)
    save(tmp_path, uncut.capture(cut), keep=0)
    uncut.train(cut, STEPS)

    resumed = Run(name, seed=1)
    resumed.net[3].load_state_dict(uncut.net[3].state_dict())  # what does not train is of the model, not of the run
    resumed.train(100, 102)  # whatever it did before is to be forgotten
    found, _ = newest(tmp_path)
    restore(found, resumed.net, resumed.optimizer)
    resumed.ema.restore(found.extra["ema"])
    resumed.train(cut, STEPS)
    assert_same(resumed.net.state_dict(), uncut.net.state_dict())
    assert_same(resumed.optimizer.state_dict(), uncut.optimizer.state_dict())
    assert_same(resumed.ema.state(), uncut.ema.state())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_differently_from_a_fresh_optimizer(name, tmp_path):
    """So that the test above can fail: the optimizer's state matters in this small run."""
    runs = [Run(name), Run(name)]
    for run in runs:
        run.train(0, 5)
    fresh = Run(name)
    fresh.net.load_state_dict(runs[1].net.state_dict())
    fresh.train(5, STEPS)
    runs[0].train(5, STEPS)
    assert not torch.equal(fresh.net[2].weight, runs[0].net[2].weight)


def test_types_of_each_kind_are_kept(tmp_path):
    run = Run("adafactor")
    run.train(0, 2)
    other = Run("adafactor", seed=1)
    restore(roundtrip(run.capture(2), tmp_path / "adafactor"), other.net, other.optimizer)
    weight = other.optimizer.state[other.net[2].weight]
    assert type(weight["step"]) is int and weight["step"] == 2
    assert other.optimizer.param_groups[0]["eps"] == (1e-30, 1e-3)
    assert other.optimizer.param_groups[0]["beta1"] is None

    run = Run("schedule_free")
    run.train(0, 3)
    other = Run("schedule_free", seed=1)
    restore(roundtrip(run.capture(3), tmp_path / "schedule_free"), other.net, other.optimizer)
    group = other.optimizer.param_groups[0]
    assert type(group["k"]) is int and group["k"] == 3 and group["train_mode"] is True
    assert group["weight_sum"] == run.optimizer.param_groups[0]["weight_sum"] > 0


class Compressing(torch.optim.Optimizer):
    """Keeps state in the manner of bitsandbytes: bytes, one map for all parameters, a dictionary of its own.

    Like that it takes its state back itself: torch would make floats of the bytes.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.5), "limit": None, "bits": [8, True, "two"]})
        self.map = torch.linspace(-1, 1, 256)

    def step(self) -> None:
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                codes = torch.full((3, 2), 200 + number, dtype=torch.uint8)
                self.state[parameter] = {"step": 7, "quant": {"codes": codes, "map": self.map}, "empty": {}}

    def load_state_dict(self, state_dict: dict) -> None:
        self.taken = state_dict


def roundtrip(captured: checkpoint.Checkpoint, folder: Path) -> checkpoint.Checkpoint:
    save(folder, captured, keep=0)
    found, damaged = newest(folder)
    assert not damaged
    return found


def test_bytes_and_shared_maps_are_kept(tmp_path):
    net, other = make_net(), make_net(1)
    optimizer, fresh = (Compressing(list(trained_parameters(each).values())) for each in (net, other))
    optimizer.step()
    found = roundtrip(capture(1, net, optimizer, {}), tmp_path)
    assert [name for name in found.optimizer if name.endswith("map")] == ["0.quant.map"]
    restore(found, other, fresh)
    assert_same(fresh.taken, optimizer.state_dict())
    assert fresh.taken["state"][0]["quant"]["map"] is fresh.taken["state"][1]["quant"]["map"]


def test_state_that_would_need_pickle_is_refused(tmp_path):
    net = make_net()
    optimizer = Compressing(list(trained_parameters(net).values()))
    optimizer.step()
    optimizer.state[net[0].bias]["seen"] = {1, 2}
    with pytest.raises(TypeError, match=r"keeps 1\.seen, a set"):
        capture(1, net, optimizer, {})


def test_average_and_points_are_files_of_their_own(tmp_path):
    run = Run("adamw")
    run.train(0, 1)
    points = {"x_t": torch.randn(2, 3), "t": torch.tensor([3, 7])}
    extra = {"ema": run.ema.state(), "points": points}
    save(tmp_path, capture(1, run.net, run.optimizer, {"a": [1, None]}, extra), keep=0)
    save(tmp_path, capture(2, run.net, run.optimizer, {}, {"points": {}}), keep=0)
    names = {"weights.safetensors", "optimizer.safetensors", "state.json"}
    manifests = [json.loads((tmp_path / f"step-{step}" / "manifest.json").read_text())["files"] for step in (1, 2)]
    assert set(manifests[0]) == names | {"ema.safetensors", "points.safetensors"} and set(manifests[1]) == names
    assert_same(load_file(tmp_path / "step-1" / "points.safetensors"), points)
    found, plain = at(tmp_path, 1), at(tmp_path, 2)
    assert_same(found.extra, extra)
    assert found.state["a"] == [1, None] and plain.extra == {}


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_protected_checkpoints_stay(tmp_path):
    run = Run("adamw")
    for step in range(1, 5):
        save(tmp_path, run.capture(step), keep=2, protected={1})
    assert steps(tmp_path) == [1, 3, 4]
    save(tmp_path, run.capture(5), keep=2, protected={3})
    assert steps(tmp_path) == [3, 4, 5]
    save(tmp_path, run.capture(6), keep=2)
    assert steps(tmp_path) == [5, 6]
    save(tmp_path, run.capture(7), keep=0)
    assert steps(tmp_path) == [5, 6, 7]


def test_which_checkpoints_are_superseded():
    steps = list(range(0, 1100, 100))
    assert superseded(steps, 1000, last=2, every=0, protected=set()) == steps[:-2]
    assert superseded(steps, 1000, last=2, every=300, protected={0, 500}) == [100, 200, 400, 700, 800]
    assert superseded(steps, 1000, last=2, every=300, protected=set())[0] == 0  # the start is no multiple that counts
    assert superseded(steps, 1000, last=0, every=300, protected=set()) == []
    assert superseded([100, 150, 900], 150, last=1, every=0, protected=set()) == [100]  # 900 is damaged: not counted


def test_multiples_stay(tmp_path):
    run = Run("adamw")
    for step in range(1, 8):
        save(tmp_path, run.capture(step), keep=1, keep_every=3)
    assert steps(tmp_path) == [3, 6, 7]


def test_a_damaged_later_checkpoint_costs_no_whole_one(tmp_path):
    run = Run("adamw")
    for step in (1, 9):
        save(tmp_path, run.capture(step), keep=0)
    (tmp_path / "step-9" / "state.json").write_text("{")
    save(tmp_path, run.capture(2), keep=1)  # the run went on from step 1
    assert steps(tmp_path) == [2, 9] and newest(tmp_path)[0].step == 2


def test_a_damaged_checkpoint_is_replaced(tmp_path):
    run = Run("adamw")
    save(tmp_path, run.capture(1), keep=0)
    (tmp_path / "step-1" / "state.json").write_text("{")
    save(tmp_path, run.capture(1), keep=0)
    assert at(tmp_path, 1).step == 1 and steps(tmp_path) == [1]


def test_what_was_captured_stays_when_the_run_goes_on():
    run = Run("adamw")
    run.train(0, 2)
    points = {"x_t": torch.randn(2, 3)}
    captured = capture(2, run.net, run.optimizer, {}, {"ema": run.ema.state(), "points": points})
    kept = [{name: value.clone() for name, value in part.items()} for part in held(captured)]
    run.train(2, 4)
    points["x_t"] += 1
    assert_same(held(captured), kept)
    assert not torch.equal(captured.weights["0.weight"], run.net[0].weight)


def test_the_next_checkpoint_takes_the_same_memory():
    run, host = Run("adamw"), Host()
    places = []
    for step in range(1, 3):
        run.train(step - 1, step)
        captured = capture(step, run.net, run.optimizer, {}, {"ema": run.ema.state()}, host)
        places.append([value.data_ptr() for part in held(captured) for value in part.values()])
        assert torch.equal(captured.weights["0.weight"], run.net[0].weight)
    assert places[0] == places[1] and len(set(places[0])) == len(places[0])


def held(captured: checkpoint.Checkpoint) -> list[dict[str, torch.Tensor]]:
    return [captured.weights, captured.optimizer, *captured.extra.values()]


def test_one_step_is_found_if_it_is_whole(tmp_path):
    run = Run("adamw")
    for step in (2, 10):
        save(tmp_path, run.capture(step), keep=0)
    assert at(tmp_path, 2).step == 2 and newest(tmp_path)[0].step == 10
    assert at(tmp_path, 1) is None
    average = tmp_path / "step-2" / "ema.safetensors"
    average.write_bytes(average.read_bytes()[:-1] + b"\x01")
    assert at(tmp_path, 2) is None and at(tmp_path, 10).step == 10
    (tmp_path / "step-10" / "optimizer.safetensors").unlink()
    assert newest(tmp_path) == (None, [tmp_path / "step-10", tmp_path / "step-2"])


def test_a_checkpoint_that_was_not_finished_is_not_seen(tmp_path, monkeypatch):
    run = Run("adamw")
    save(tmp_path, run.capture(1), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(OSError("the machine went down")))
        with pytest.raises(OSError, match="went down"):
            save(tmp_path, run.capture(2), keep=1)
    assert newest(tmp_path)[0].step == 1 and at(tmp_path, 2) is None
    save(tmp_path, run.capture(3), keep=1)
    assert steps(tmp_path) == [3]  # what was left half written is gone too


def test_all_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    run, events = Run("adamw"), []
    save(tmp_path, run.capture(1), keep=1)
    real_flush, real_rename, real_remove = checkpoint.flush, Path.rename, shutil.rmtree

    def rename(self, target):
        events.append(("rename", self.name, target.name))
        return real_rename(self, target)

    monkeypatch.setattr(checkpoint, "flush", lambda path: (events.append(("flush", path.name)), real_flush(path)))
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", lambda path: (events.append(("remove", path.name)), real_remove(path)))
    save(tmp_path, run.capture(2), keep=1)
    names = sorted(path.name for path in (tmp_path / "step-2").iterdir())
    part = next(name for kind, *name in events if kind == "rename")[0]
    last = [("rename", part, "step-2"), ("flush", tmp_path.name)]
    assert sorted(events[: len(names)]) == [("flush", name) for name in names] and len(names) == 5
    assert events[len(names) : len(names) + 3] == [("flush", part), *last]
    assert [event[:2] for event in events[len(names) + 3 :]] == [("rename", "step-1"), ("remove", events[-1][1])]


def test_weights_of_another_network_are_refused(tmp_path):
    run = Run("adamw")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError, match="other parameters"):
        restore(run.capture(1), other, torch.optim.AdamW(other.parameters()))
