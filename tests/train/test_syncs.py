"""The host waits for the device once an optimizer step, whatever the accumulation, and reads everything then."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from support.learners import learner_for
from support.runs import tiny_config, with_lora
from torch.utils._python_dispatch import TorchDispatchMode

from diffpref.objectives import DMPO, DPO, DRO, DSPO, KTO, SFT
from diffpref.points import Independent, Replay
from diffpref.train.spikes import Spikes
from diffpref.train.step import Learner

WAITING = ("tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "item")


class Reads(TorchDispatchMode):
    """Notes operations whose results the host must know: numbers, and shapes that depend on values."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"):
            self.noted.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def reads(monkeypatch) -> Iterator[list[str]]:
    """Notes whatever would wait for a GPU, were the tensors on one."""
    noted: list[str] = []
    with monkeypatch.context() as patch, Reads(noted):
        for name in WAITING:
            original = getattr(torch.Tensor, name)

            def method(self, *args, name=name, original=original, **kwargs):
                before = len(noted)
                found = original(self, *args, **kwargs)
                del noted[before:]  # one wait, however it is made
                noted.append(name)
                return found

            patch.setattr(torch.Tensor, name, method)
        yield noted


def made_beforehand(learner: Learner, steps: int, micros: int, monkeypatch) -> None:
    """Let the host side of the batches be made already, as the thread that reads ahead makes it."""
    loader = learner.data.loader
    places = [learner.places(step, micro) for step in range(steps) for micro in range(micros)]
    made = {tuple(each): loader.collect(each) for each in places}
    monkeypatch.setattr(learner.data, "batch", lambda places, following: loader.deliver(made[tuple(places)]))


def test_reads_are_noted(monkeypatch):
    values = torch.arange(4.0)
    with reads(monkeypatch) as noted:
        values.sum() + 1
        assert noted == []
        float(values[0])
        values.tolist()
        assert values.sum() > 3
        values[values > 1]
    assert noted == ["__float__", "tolist", "__bool__", "index"]


@pytest.mark.parametrize(
    ("objective", "points", "lora"),
    [
        (DPO(beta=10.0), None, False),
        (DPO(beta=10.0), None, True),
        (DSPO(), None, False),
        (DMPO(), None, False),
        (KTO(), Independent(), False),
        (SFT(), Independent(), False),
        (DRO(), Replay(steps=3, sampler="ddim"), False),
        (DRO(), Replay(steps=3, policy_copy_steps=2, guidance_scale=2.0), True),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_one_read_a_step(pipeline, tiny_pairs, tmp_path, monkeypatch, objective, points, lora):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", gradient_accumulation_steps=4, ema=True)
    config = replace(with_lora(config) if lora else config, objective=objective)
    config = replace(config, points=points or config.points, train=replace(config.train, snr_gamma=5.0))
    learner, optimizer, run = learner_for(config)
    made_beforehand(learner, 3, 4, monkeypatch)
    learner = replace(learner, spikes=Spikes(5.0))
    learner.step(0, optimizer)  # what is made once
    for step in (1, 2):
        with reads(monkeypatch) as noted:
            run.set_learning_rate()
            taken = learner.step(step, optimizer)
            run.step = step + 1
            run.count(taken)
            run.average()
            run.watch(taken.entry)
        assert noted == ["tolist"]
