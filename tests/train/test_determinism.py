"""Deterministic mode: on while a run lasts, and away after it, however it ends."""

import os

import pytest
import torch
from support.runs import metrics, tiny_config

from diffpref.train import loop
from diffpref.train.determinism import deterministic


def settings() -> dict[str, object]:
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "tf32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


WANTED = {
    "algorithms": True, "cudnn": True, "benchmark": False, "tf32": (False, False), "workspace": ":4096:8"
}  # fmt: skip


@pytest.mark.parametrize("before", [False, True])
def test_it_is_on_within_and_as_before_after(monkeypatch, before):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before
    found = settings()
    with deterministic(False):
        assert settings() == found
    with pytest.raises(ZeroDivisionError), deterministic(True):
        assert settings() == WANTED
        raise ZeroDivisionError
    assert settings() == found
    torch.backends.cuda.matmul.allow_tf32 = kept


def test_a_workspace_of_the_users_own_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert settings()["workspace"] == ":16:8"
    assert settings()["workspace"] == ":16:8"


@pytest.mark.parametrize("wanted", [False, True])
def test_a_run_trains_in_it_if_asked(pipeline, tiny_pairs, tmp_path, monkeypatch, wanted):
    seen, step = [], loop.Learner.step

    def noted(self, number, optimizer):
        seen.append(settings()["algorithms"])
        return step(self, number, optimizer)

    monkeypatch.setattr(loop.Learner, "step", noted)
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=2, deterministic=wanted)
    assert len(metrics(loop.train(config))) == 2
    assert seen == [wanted] * 2 and not settings()["algorithms"]
