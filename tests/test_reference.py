"""References: equal to the policy at the start, then where it started, or an average behind it."""

import pytest
import torch
from support.tiny import learn, load, points, predict

from diffpref.reference import MovingReference, adapters_off, frozen_copy


def test_adapters_off_is_the_base_and_leaves_them_on(pipeline):
    backbone, base = load(pipeline, trainable=True, lora_rank=2), load(pipeline)
    at = points(base)
    learn(backbone)
    moved = predict(backbone, at).detach()
    known = adapters_off(backbone)(at.x_t, at.t, at.cond)
    torch.testing.assert_close(known, predict(base, at))
    assert not known.requires_grad
    assert torch.equal(predict(backbone, at), moved)
    assert all(p.requires_grad == ("lora_" in name) for name, p in backbone.net.named_parameters())
    learn(backbone, steps=1)
    assert not torch.equal(predict(backbone, at), moved)


def test_adapters_come_back_after_a_failure(pipeline):
    backbone = load(pipeline, trainable=True, lora_rank=2)
    learn(backbone)
    at = points(backbone)
    moved = predict(backbone, at).detach()
    with pytest.raises(RuntimeError):
        adapters_off(backbone)(at.x_t[:, :2], at.t, at.cond)
    assert torch.equal(predict(backbone, at), moved)


def test_a_frozen_copy_stays_where_the_policy_started(pipeline):
    backbone = load(pipeline, trainable=True)
    at = points(backbone)
    before = predict(backbone, at).detach()
    reference = frozen_copy(backbone)
    assert torch.equal(reference(at.x_t, at.t, at.cond), before) and not reference(at.x_t, at.t, at.cond).requires_grad
    learn(backbone)
    assert (predict(backbone, at) - before).abs().max() > 1e-3
    assert torch.equal(reference(at.x_t, at.t, at.cond), before)
    assert all(p.requires_grad for p in backbone.net.parameters())


@pytest.mark.parametrize("rank", [0, 2])
def test_a_moving_reference_is_the_average_of_the_weights(pipeline, rank):
    backbone = load(pipeline, trainable=True, lora_rank=rank)
    at = points(backbone)
    reference = MovingReference(backbone, decay=0.75)
    assert torch.equal(reference(at.x_t, at.t, at.cond), predict(backbone, at))
    trained = {name: p for name, p in backbone.net.named_parameters() if p.requires_grad}
    expected = {name: p.detach().double() for name, p in trained.items()}
    for _ in range(3):
        learn(backbone, steps=1)
        reference.follow(backbone.net)
        expected = {name: 0.75 * value + 0.25 * trained[name].detach().double() for name, value in expected.items()}
    assert reference.state().keys() == trained.keys()
    for name, value in reference.state().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
    known = reference(at.x_t, at.t, at.cond)
    assert not known.requires_grad and not torch.equal(known, predict(backbone, at))
    averaged = load(pipeline, trainable=True, lora_rank=rank)
    averaged.net.load_state_dict(backbone.net.state_dict() | reference.state())
    assert torch.equal(known, predict(averaged, at))


def test_a_moving_reference_refuses_the_state_of_another_network(pipeline):
    reference = MovingReference(load(pipeline, trainable=True, lora_rank=2), decay=0.9)
    kept = {name: value.clone() for name, value in reference.state().items()}
    with pytest.raises(KeyError, match="of other parameters"):
        reference.restore({})
    reference.restore({name: value + 1 for name, value in kept.items()})
    assert all(torch.equal(value, kept[name] + 1) for name, value in reference.state().items())
