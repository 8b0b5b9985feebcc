"""The host waits for the device once an optimizer step, whatever the accumulation, and reads everything then."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.learners import learner_for
from support.runs import tiny_config, with_lora
from torch.utils._python_dispatch import TorchDispatchMode

from diffpref.objectives import DMPO, DPO, DRO, DSPO, KTO, SFT
from diffpref.points import Independent, Replay
from diffpref.train import replay
from diffpref.train.spikes import Spikes
from diffpref.train.step import Learner

NOTED: list[str] = []  # what would wait for a GPU, were the tensors on one
WAITING = ("tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "item")


class Reads(TorchDispatchMode):
    """Notes operations whose results the host must know: numbers, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"):
            NOTED.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def reads(monkeypatch) -> Iterator[list[str]]:
    """Notes from here on, and how each wait is made."""
    NOTED.clear()
    with monkeypatch.context() as patch, Reads():
        for name in WAITING:
            original = getattr(torch.Tensor, name)

            def method(self, *args, name=name, original=original, **kwargs):
                before = len(NOTED)
                found = original(self, *args, **kwargs)
                del NOTED[before:]  # one wait, however it is made
                NOTED.append(name)
                return found

            patch.setattr(torch.Tensor, name, method)
        yield NOTED


def made_beforehand(learner: Learner, steps: int, micros: int, monkeypatch) -> None:
    """Let the host side of the batches be made already, as the thread that reads ahead makes it."""
    loader = learner.data.loader
    places = [learner.places(step, micro) for step in range(steps) for micro in range(micros)]
    made = {tuple(each): loader.collect(each) for each in places}
    monkeypatch.setattr(learner.data, "batch", lambda places, following: loader.deliver(made[tuple(places)]))


def of_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which looks at numbers of the host alone, without notes of that."""

    def called(*args: Any) -> Any:
        before = list(NOTED)
        found = function(*args)
        NOTED[:] = before
        return found

    return called


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
    monkeypatch.setattr(replay, "make_solver", of_the_host(replay.make_solver))
    for step in (1, 2):
        with reads(monkeypatch) as noted:
            run.set_learning_rate()
            taken = learner.step(step, optimizer)
            run.step = step + 1
            run.count(taken)
            run.average()
            run.watch(taken.entry)
        assert noted == ["tolist"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, where torch itself tells")
@pytest.mark.parametrize("points", [None, Replay(steps=3, policy_copy_steps=2, guidance_scale=2.0)])
def test_a_gpu_is_waited_for_once(pipeline, tiny_pairs, tmp_path, monkeypatch, points):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", gradient_accumulation_steps=4, ema=True)
    if points:
        config = replace(config, objective=DRO(), points=points)
    learner, optimizer, run = learner_for(config, cpu=False)
    made_beforehand(learner, 3, 4, monkeypatch)
    for step in range(2):
        learner.step(step, optimizer)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="called a synchronizing CUDA operation") as noted:
            learner.step(2, optimizer)
            run.average()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in noted if "synchronizing" in str(each.message)]) == 1
