"""Reading ahead changes nothing but the time, and its errors come where the batch is asked for."""

import threading
from dataclasses import replace

import pytest
import torch
from support.tiny import SIDE, load, make_direct, make_pairs, write_pairs

from diffpref.data.ahead import Ahead
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.loader import Loader
from diffpref.data.store import build_store
from diffpref.errors import RunError
from diffpref.train.config import DataConfig

DATA = DataConfig(resolution=SIDE, flip=True, prompt_dropout=0.3, latents="moments")


@pytest.fixture(scope="module")
def loader(tmp_path_factory, pipeline):
    folder, backbone = tmp_path_factory.mktemp("ahead"), load(pipeline)
    dataset = PreferenceDataset.open(write_pairs(folder / "data", make_pairs(12)))
    store = build_store(folder / "store", dataset, backbone, DATA)
    return Loader(dataset, store, backbone, DATA, list(range(12)), 0, "pairs")


def places(step: int) -> list[int]:
    return [3 * step, 3 * step + 1, 3 * step + 2]


def test_batches_are_those_of_the_loader_in_any_sequence(loader):
    ahead = Ahead(loader)
    for step in (0, 1, 2, 7, 8, 3):  # jumps too, as after a rollback
        found, expected = ahead.batch(places(step), lambda step=step: places(step + 1)), loader.batch(places(step))
        assert torch.equal(found.latents, expected.latents) and found.id == expected.id and found.draw == expected.draw
        assert torch.equal(found.cond["text"], expected.cond["text"]) and torch.equal(found.label, expected.label)
    assert ahead.waited > 0
    ahead.close()


def test_the_next_batch_is_made_in_a_thread_and_the_thread_ends(loader, monkeypatch):
    made, collect = [], Loader.collect
    monkeypatch.setattr(
        Loader, "collect", lambda self, at: made.append((at, threading.current_thread().name)) or collect(self, at)
    )
    ahead = Ahead(loader)
    for step in range(3):
        ahead.batch(places(step), lambda step=step: places(step + 1))
    ahead.close()
    assert [at for at, _ in made[:3]] == [places(step) for step in range(3)]  # the fourth may not have begun
    assert [name.startswith("data") for _, name in made[:3]] == [False, True, True]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_an_error_is_raised_by_the_call_that_needs_the_batch(loader, monkeypatch):
    collect = Loader.collect

    def broken(self, at):
        if at == places(1):
            raise RunError("damaged")
        return collect(self, at)

    monkeypatch.setattr(Loader, "collect", broken)
    ahead = Ahead(loader)
    ahead.batch(places(0), lambda: places(1))
    with pytest.raises(RunError, match="damaged"):
        ahead.batch(places(1), lambda: places(2))
    ahead.close()


def test_what_runs_a_network_is_not_read_ahead(loader):
    data = replace(DATA, cache="none")
    direct = replace(loader, store=make_direct(loader.dataset, loader.backbone, data), data=data)
    before = threading.active_count()
    ahead = Ahead(direct)
    found = ahead.batch(places(0), lambda: pytest.fail("the next batch was asked for"))
    assert threading.active_count() == before
    assert torch.equal(found.latents, direct.batch(places(0)).latents)
    ahead.close()
