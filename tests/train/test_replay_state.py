"""The replay buffer's state: the split of the batch changes nothing, and what is kept goes on where it was."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.replay import KEEPING, SHORT, assert_same, batch, item
from support.tiny import learn, load
from torch import Tensor

from diffpref.models.sd import StableDiffusion
from diffpref.points import Replay
from diffpref.train.replay import ReplayBuffer, Share


def run(
    points: Replay, backbone: StableDiffusion, shares: list[Share], steps: int, first: list[ReplayBuffer] | None = None
) -> tuple[list[list[Tensor]], list[ReplayBuffer]]:
    """Points of every item of `steps` steps in the order of their places; the policy learns between the steps.

    One buffer a process. They stand where `first` stands, else at the start.
    """
    buffers = first or [ReplayBuffer(points, backbone, share) for share in shares]
    items, found = shares[0].size * shares[0].micros * shares[0].processes, []
    begun = buffers[0].seen // shares[0].items
    for step in range(begun, begun + steps):
        here = {}
        for buffer, share in zip(buffers, shares, strict=True):
            places = share.places(share.process)
            for micro in range(share.micros):
                mine = places[micro * share.size : (micro + 1) * share.size]
                draws = range(step * items + mine[0], step * items + mine[-1] + 1)
                made = buffer(batch(backbone, draws, points.takes_pairs))
                here |= {place: item(made, i) for i, place in enumerate(mine)}
        found += [here[place] for place in range(items)]
        torch.manual_seed(step)
        learn(backbone, steps=1, rate=0.003)
    return found, buffers


def joined(buffers: list[ReplayBuffer]) -> dict[str, Tensor]:
    """The state of several processes' buffers: what the first one gathers from all of them."""
    parts = [{"count": buffer.kept.count, **buffer.kept.tensors} for buffer in buffers]

    def gather(own: Tensor) -> Tensor:
        (name,) = (name for name, value in parts[0].items() if value is own)
        return torch.cat([part[name] for part in parts])

    buffers[0].gather = gather
    return buffers[0].state()


MIXED = replace(KEEPING, offline_share=0.5)
SPLITS = [[Share(2, 2)], [Share(2, 1, p, 2) for p in range(2)], [Share(1, 1, p, 4) for p in range(4)]]
SPLITS += [[Share(1, 2, p, 2) for p in range(2)]]


def test_a_share_is_the_places_that_its_micro_batches_take():
    assert Share(2, 3).places(0) == [0, 1, 2, 3, 4, 5]
    assert Share(2, 2, 1, 3).places(1) == [2, 3, 8, 9]
    assert sorted(place for p in range(3) for place in Share(2, 2, 0, 3).places(p)) == list(range(12))


@pytest.mark.parametrize("points", [SHORT, KEEPING, MIXED], ids=["published", "keeping", "mixed"])
def test_the_split_of_the_effective_batch_changes_nothing(pipeline, points):
    whole, _ = run(points, load(pipeline, trainable=True), [Share(4)], 4)
    for split in SPLITS if points is MIXED else SPLITS[:1]:
        parts, _ = run(points, load(pipeline, trainable=True), split, 4)
        for ours, theirs in zip(parts, whole, strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("points", "lora"),
    [(SHORT, 0), (replace(SHORT, policy_copy_steps=3), 4), (KEEPING, 0), (MIXED, 4)],
    ids=["published", "copying", "keeping", "mixed"],
)
def test_a_restored_buffer_goes_on_bit_by_bit(pipeline, tmp_path, points, lora):
    backbone = load(pipeline, trainable=True, lora_rank=lora)
    if lora:
        torch.manual_seed(0)
        learn(backbone, steps=1)  # new adapters change nothing yet
    share = [Share(2, 2)]
    _, buffers = run(points, backbone, share, 3)
    save_file(buffers[0].state(), tmp_path / "replay.safetensors")
    held = {name: value.clone() for name, value in backbone.net.state_dict().items()}
    expected, _ = run(points, backbone, share, 2, buffers)

    backbone.net.load_state_dict(held)
    resumed = ReplayBuffer(points, backbone, share[0])
    resumed.restore(load_file(tmp_path / "replay.safetensors"))
    found, _ = run(points, backbone, share, 2, [resumed])
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs, exactly=True)


@pytest.mark.parametrize("points", [KEEPING, MIXED], ids=["keeping", "mixed"])
def test_a_state_goes_to_another_split(pipeline, points):
    backbone, two = load(pipeline, trainable=True), SPLITS[3]
    _, buffers = run(points, backbone, two, 3)
    state = joined(buffers)
    held = {name: value.clone() for name, value in backbone.net.state_dict().items()}
    expected, _ = run(points, backbone, two, 2, buffers)
    for split in (SPLITS[0], SPLITS[2]):
        backbone.net.load_state_dict(held)
        resumed = [ReplayBuffer(points, backbone, share) for share in split]
        for buffer in resumed:
            buffer.restore(state)
        found, _ = run(points, backbone, split, 2, resumed)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)


def test_a_lost_state_would_show(pipeline):
    """The published code loses its buffer on save and on resume."""
    backbone, share = load(pipeline, trainable=True), [Share(4)]
    _, buffers = run(KEEPING, backbone, share, 3)
    state = buffers[0].state()
    assert {"step", "kept.x_t", "kept.count", "kept.cond.text", "kept.latents"} <= set(state)
    forgetful = ReplayBuffer(KEEPING, backbone, share[0])
    forgetful.restore({name: value for name, value in state.items() if not name.startswith("kept.")})
    given = batch(backbone, range(12, 16))
    assert not torch.equal(forgetful(given).x_t, buffers[0](given).x_t)


def test_the_published_settings_keep_nothing(pipeline):
    _, (buffer,) = run(SHORT, load(pipeline, trainable=True), [Share(2)], 2)
    assert set(buffer.state()) == {"step"}
