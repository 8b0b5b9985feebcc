"""The replay buffer: what a row is made of, whose weights sample, and what is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import diffusers
import pytest
import torch
from support.replay import CLOSE, KEEPING, SHORT, batch
from support.tiny import learn, load
from torch import Tensor

from diffpref.draws import generator, uniform
from diffpref.errors import UserError
from diffpref.models.sd import StableDiffusion
from diffpref.objectives import DRO
from diffpref.points import Paired, Replay
from diffpref.reference import frozen_copy
from diffpref.schedules import FlowSchedule
from diffpref.train.replay import ReplayBuffer, Share
from diffpref.types import Outputs

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.fixture(params=["epsilon", "v_prediction", "flow"])
def model(request, pipeline, v_pipeline) -> tuple[StableDiffusion, Replay]:
    """A tiny policy of each kind, and points that suit it."""
    if request.param == "flow":
        return as_flow(load(pipeline, trainable=True)), replace(SHORT, sampler="flow")
    return load(v_pipeline if request.param == "v_prediction" else pipeline, trainable=True), SHORT


def as_flow(backbone: StableDiffusion) -> StableDiffusion:
    return replace(backbone, schedule=FlowSchedule(3.0), scheduler_config=FLOW)


def test_the_experts_half_is_noised_with_fresh_noise_at_the_trajectorys_time(model):
    backbone, points = model
    given = batch(backbone, range(6))
    made = ReplayBuffer(points, backbone, Share(6))(given)
    noise = torch.stack([torch.randn(4, 8, 8, generator=generator(draw, "noise")) for draw in given.draw])
    assert torch.equal(made.t[:6], made.t[6:])
    assert torch.equal(made.x_t[:6], backbone.schedule.add_noise(given.latents, noise, made.t[:6]))
    assert torch.equal(made.target[:6], backbone.schedule.target(given.latents, noise, made.t[:6]))
    assert made.label.tolist() == [1.0] * 6
    assert torch.equal(made.weight, given.weight)
    assert all(torch.equal(half, given.cond["text"]) for half in made.cond["text"].chunk(2))


def test_the_policys_half_is_its_own_prediction_where_it_stood(model):
    backbone, points = model
    made = ReplayBuffer(points, backbone, Share(6))(batch(backbone, range(6)))
    with torch.no_grad():
        predicted = backbone.predict(made.x_t[6:], made.t[6:], {"text": made.cond["text"][6:]})
    torch.testing.assert_close(made.target[6:], predicted, **CLOSE)
    assert len(set(made.t.tolist())) > 3
    assert not made.x_t.requires_grad and not made.target.requires_grad
    assert made.target.dtype == made.x_t.dtype == torch.float32


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++"])
def test_a_row_is_a_step_of_the_items_trajectory_by_diffusers(pipeline, sampler):
    backbone = load(pipeline)
    given = batch(backbone, range(5))
    made = ReplayBuffer(Replay(sampler=sampler, steps=5), backbone, Share(5))(given)
    kind = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler"}[sampler]
    for i, draw in enumerate(given.draw):
        times = torch.arange(4, -1, -1) * 200 + int(200 * uniform(draw, "trajectory jitter"))
        scheduler = getattr(diffusers, kind).from_config(backbone.scheduler_config)
        if sampler == "ddim":
            scheduler.set_timesteps(5)
            scheduler.timesteps = times
        else:
            scheduler.set_timesteps(timesteps=times.tolist())
        source = generator(draw, "trajectory")
        x = torch.randn(1, 4, 8, 8, generator=source)
        noise = {"generator": source} if sampler == "ddpm" else {}
        for step, t in enumerate(times):
            with torch.no_grad():
                prediction = backbone.predict(x, t[None], {"text": given.cond["text"][[i]]})
            if step == int(5 * uniform(draw, "trajectory step")):
                break
            x = scheduler.step(prediction, t, x, return_dict=False, **noise)[0]
        assert made.t[i + 5] == t
        torch.testing.assert_close(made.x_t[[i + 5]], x, **CLOSE)
        torch.testing.assert_close(made.target[[i + 5]], prediction, **CLOSE)


@contextmanager
def counted(buffer: ReplayBuffer) -> Iterator[list[int]]:
    """The rows of every forward of the sampling, none of them with gradients."""
    sizes, plain = [], buffer._sampled_with.predict

    def predict(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        assert not torch.is_grad_enabled()
        sizes.append(len(x_t))
        return plain(x_t, t, cond)

    buffer._sampled_with.predict = predict
    yield sizes
    del buffer._sampled_with.predict


def test_one_forward_a_step_and_none_beyond_the_point(pipeline):
    backbone = load(pipeline)
    buffer = ReplayBuffer(replace(SHORT, steps=7), backbone, Share(6))
    with counted(buffer) as sizes:
        buffer(batch(backbone, range(6)))
    last = [int(7 * uniform(draw, "trajectory step")) for draw in range(6)]
    assert sizes == [sum(end >= step for end in last) for step in range(max(last) + 1)]


@pytest.mark.parametrize("kept", [{}, {"trajectories": 2, "refresh_steps": 2, "policy_copy_steps": 2}])
def test_guidance_is_in_the_recorded_prediction(pipeline, kept):
    backbone = load(pipeline)
    given = batch(backbone, range(4))
    made = ReplayBuffer(replace(SHORT, guidance_scale=4.0, **kept), backbone, Share(4))(given)
    at = made.x_t[4:], made.t[4:]
    with torch.no_grad():
        without = backbone.predict(*at, backbone.encode_prompts([""] * 4))
        told = backbone.predict(*at, given.cond)
    torch.testing.assert_close(made.target[4:], without + 4.0 * (told - without), **CLOSE)
    assert (told - without).abs().max() > 1e-3
    plain = ReplayBuffer(SHORT, backbone, Share(4))(given)
    assert not torch.equal(plain.x_t[4:], made.x_t[4:])


def test_a_network_that_takes_the_guidance_scale_gets_it(pipeline):
    class Embedding(StableDiffusion):
        scale = 1.0

        @property
        def embeds_guidance(self) -> bool:
            return True

        def with_guidance(self, scale: float) -> StableDiffusion:
            other = Embedding(**vars(self))
            other.scale = scale
            return other

        def predict(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return self.scale * x_t

    backbone = Embedding(**vars(load(pipeline)))
    given = batch(load(pipeline), range(3))
    made = ReplayBuffer(replace(SHORT, guidance_scale=3.5), backbone, Share(3))(given)
    torch.testing.assert_close(made.target[3:], 3.5 * made.x_t[3:])
    made = ReplayBuffer(SHORT, backbone, Share(3))(given)
    torch.testing.assert_close(made.target[3:], made.x_t[3:])


@pytest.mark.parametrize("lora", [0, 4])
def test_a_copied_policy_samples_and_leaves_no_trace(pipeline, lora):
    backbone = load(pipeline, trainable=True, lora_rank=lora)
    buffer = ReplayBuffer(replace(SHORT, policy_copy_steps=2), backbone, Share(3))
    learn(backbone)
    early = {name: value.clone() for name, value in backbone.net.state_dict().items()}
    buffer(batch(backbone, range(3)))
    learn(backbone)
    late = {name: value.clone() for name, value in backbone.net.state_dict().items()}
    places = [value.data_ptr() for value in backbone.net.parameters()]

    given = batch(backbone, range(3, 6))
    made = buffer(given)  # the second step, by the copy of the first
    assert [value.data_ptr() for value in backbone.net.parameters()] == places
    assert all(torch.equal(value, late[name]) for name, value in backbone.net.state_dict().items())
    assert len(buffer.copies) == len(buffer.trained) == sum(p.requires_grad for p in backbone.net.parameters())
    backbone.net.load_state_dict(early)
    with torch.no_grad():
        predicted = backbone.predict(made.x_t[3:], made.t[3:], given.cond)
    torch.testing.assert_close(made.target[3:], predicted, **CLOSE)

    backbone.net.load_state_dict(late)
    assert (backbone.predict(made.x_t[3:], made.t[3:], given.cond) - predicted).abs().max() > 1e-2
    made = buffer(batch(backbone, range(6, 9)))  # the third step, by a new copy
    with torch.no_grad():
        predicted = backbone.predict(made.x_t[3:], made.t[3:], given.cond)
    torch.testing.assert_close(made.target[3:], predicted, **CLOSE)


def test_a_failing_network_gets_its_weights_back(pipeline):
    backbone = load(pipeline, trainable=True)
    buffer = ReplayBuffer(replace(SHORT, policy_copy_steps=2), backbone, Share(2))
    buffer(batch(backbone, range(2)))
    learn(backbone, steps=1)
    places = [value.data_ptr() for value in backbone.net.parameters()]
    given = batch(backbone, range(2, 4))
    with pytest.raises(RuntimeError):
        buffer(replace(given, cond={"text": given.cond["text"][..., :3]}))
    assert [value.data_ptr() for value in backbone.net.parameters()] == places


@pytest.mark.parametrize("points", [SHORT, replace(SHORT, policy_copy_steps=2)], ids=["current", "copy"])
def test_autocast_does_not_remember_the_sampling(pipeline, points):
    """Its cache holds weights as they were cast without gradients, and as the copy had them."""
    backbone = load(pipeline, trainable=True)
    buffer = ReplayBuffer(points, backbone, Share(2))
    buffer(batch(backbone, range(2)))
    learn(backbone)
    with torch.autocast("cpu", torch.bfloat16):
        given = batch(backbone, range(2, 4))
        made = buffer(given)
        predicted = backbone.predict(made.x_t, made.t, made.cond)
    predicted.float().square().sum().backward()
    assert all(value.grad is not None for value in backbone.net.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predicted, backbone.predict(made.x_t, made.t, made.cond))
    assert made.target.dtype == torch.float32


def test_kept_trajectories_are_replayed_at_other_points(pipeline):
    backbone = load(pipeline)
    buffer = ReplayBuffer(replace(SHORT, refresh_steps=3), backbone, Share(4))
    with counted(buffer) as sizes:
        made = [buffer(batch(backbone, range(4 * step, 4 * step + 4))) for step in range(4)]
    assert sizes == [4] * 8  # four forwards at steps 0 and 3, none between
    first, noises = batch(backbone, range(4)), [points.target[:4] for points in made]
    for points, noise in zip(made[:3], noises, strict=False):  # experts, prompts and weights are the trajectory's
        assert torch.equal(points.x_t[:4], backbone.schedule.add_noise(first.latents, noise, points.t[:4]))
        assert torch.equal(points.cond["text"], first.cond["text"].repeat(2, 1, 1))
        assert points.weight.tolist() == [1, 2, 3, 4]
        for row in range(4):
            path = buffer_path(backbone, 4)[row]
            assert any(torch.allclose(points.x_t[4 + row], x_t, **CLOSE) for x_t in path)
    assert len({tuple(points.t.tolist()) for points in made[:3]}) > 1
    assert made[3].weight.tolist() == [3, 4, 5, 1]
    assert not torch.equal(noises[0], noises[1])


def buffer_path(backbone: StableDiffusion, items: int) -> Tensor:
    """All noisy latents of the trajectories of the first items: (items, steps, C, h, w)."""
    buffer = ReplayBuffer(replace(SHORT, trajectories=2), backbone, Share(items))
    buffer(batch(backbone, range(items)))
    assert buffer.kept.tensors["x_t"].device.type == "cpu"
    return buffer.kept.tensors["x_t"][:, 0]


def test_of_several_trajectories_one_is_drawn(pipeline):
    backbone = load(pipeline)
    buffer = ReplayBuffer(replace(SHORT, trajectories=2), backbone, Share(8))
    ages = []
    for step in range(4):
        given = batch(backbone, range(8 * step, 8 * step + 8))
        made = buffer(given)
        assert buffer.kept.count.tolist() == [step + 1] * 8
        own = (made.weight == given.weight).tolist()
        expected = [int(min(step + 1, 2) * uniform(draw, "trajectory age")) == 0 for draw in given.draw]
        assert own == expected
        ages += expected if step else []
    assert 4 < sum(ages) < 20


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_offline_pairs_are_mixed_in_by_their_share(pipeline, share):
    backbone = load(pipeline)
    points = replace(SHORT, steps=1, offline_share=share)
    assert points.takes_pairs == (share > 0) and points.gives_pairs
    given = batch(backbone, range(200), pairs=points.takes_pairs)
    buffer = ReplayBuffer(points, backbone, Share(200))
    with counted(buffer) as sizes:
        made = buffer(given)
    offline = made.label == 0.75  # the data's own label; replayed experts are always the better ones
    assert sum(sizes) == 200 - offline.sum() and max(sizes) == points.sampled_at_once
    assert (made.label[~offline] == 1).all()
    if not share:
        assert not offline.any()
        return
    assert 40 <= offline.sum() <= 80
    paired = Paired()(given, backbone.schedule)
    rows = torch.cat([offline, offline])
    assert torch.equal(made.x_t[rows], paired.x_t[rows])
    assert torch.equal(made.target[rows], paired.target[rows])
    assert torch.equal(made.t[rows], paired.t[rows])
    assert torch.equal(made.target[:200], paired.target[:200])  # the experts' noise is that of pairs
    assert not (made.x_t[200:] == paired.x_t[200:]).flatten(1).all(1)[~offline].any()
    assert torch.equal(made.cond["text"][200:][~offline], given.cond["text"][:200][~offline])


def test_a_batch_of_offline_pairs_alone_needs_no_trajectory(pipeline):
    backbone = load(pipeline)
    for points in (replace(SHORT, offline_share=0.999), replace(KEEPING, offline_share=0.999)):
        buffer, given = ReplayBuffer(points, backbone, Share(2)), batch(backbone, range(2), pairs=True)
        assert torch.equal(buffer(given).x_t, Paired()(given, backbone.schedule).x_t)
        assert ("kept.count" in buffer.state()) == (points.trajectories > 1)  # alike in all processes


def test_what_does_not_fit_is_refused(pipeline):
    backbone = load(pipeline)
    with pytest.raises(ValueError, match="need single images, not 4 rows for 2 items"):
        ReplayBuffer(SHORT, backbone, Share(2))(batch(backbone, range(2), pairs=True))
    with pytest.raises(ValueError, match="need pairs, not 2 rows for 2 items"):
        ReplayBuffer(replace(SHORT, offline_share=0.1), backbone, Share(2))(batch(backbone, range(2)))
    with pytest.raises(UserError, match=r"points.sampler: flow does not sample"):
        ReplayBuffer(replace(SHORT, sampler="flow"), backbone, Share(2))
    with pytest.raises(UserError, match=r"points.sampler: dpmsolver\+\+ .* use flow"):
        ReplayBuffer(SHORT, as_flow(backbone), Share(2))


def test_dro_on_replayed_points_learns_the_expert_images(model):
    backbone, points = model
    reference = frozen_copy(backbone)
    buffer = ReplayBuffer(points, backbone, Share(8))
    optimizer = torch.optim.Adam(backbone.net.parameters(), lr=5e-3)
    given, errors = batch(backbone, range(8)), []
    for _ in range(12):
        made = buffer(given)
        known = reference(made.x_t, made.t, made.cond)
        predicted = backbone.predict(made.x_t, made.t, made.cond)
        loss, metrics = DRO()(Outputs(predicted, made.target, known, made.label, made.weight))
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append((metrics["policy_error_chosen"] - metrics["reference_error_chosen"]).mean().item())
        assert metrics["policy_error_rejected"].max() < 1e-6  # on policy and unguided, it predicts its own prediction
    assert errors[0] == pytest.approx(0, abs=1e-6)
    assert errors[-1] < -0.05
