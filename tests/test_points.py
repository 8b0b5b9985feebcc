"""Points: what the rows of a pair share, and that a sample's points depend on its draw alone."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from diffpref.points import Independent, Paired
from diffpref.schedules import DiffusionSchedule, from_scheduler_config
from diffpref.types import Batch, Points

DRAWS = (11, 22, 33)
V = from_scheduler_config({"prediction_type": "v_prediction"})


def batch(rows: int, draws: tuple[int, ...] = DRAWS) -> Batch:
    items = len(draws)
    return Batch(
        latents=torch.randn(rows, 4, 5, 6, generator=torch.Generator().manual_seed(0)),
        cond={"text": torch.arange(float(rows)).reshape(rows, 1, 1)},
        label=torch.linspace(0.5, 1, items),
        weight=torch.linspace(1, 2, items),
        id=tuple(str(draw) for draw in draws),
        draw=draws,
    )


def noise_of(points: Points, schedule: DiffusionSchedule, latents: torch.Tensor) -> torch.Tensor:
    """The noise that lies in x_t."""
    kept = schedule.alphas_cumprod[points.t].reshape(-1, 1, 1, 1)
    return (points.x_t - kept.sqrt() * latents) / (1 - kept).sqrt()


def test_a_pair_shares_time_and_noise_and_pairs_differ():
    given = batch(6)
    points = Paired()(given, V)
    noise = noise_of(points, V, given.latents)
    assert points.t[:3].tolist() == points.t[3:].tolist()
    torch.testing.assert_close(noise[:3], noise[3:], atol=1e-5, rtol=1e-5)
    assert len(set(points.t.tolist())) == 3
    assert (noise[0] - noise[1]).abs().mean() > 0.5
    assert points.t.dtype == torch.int64 and points.x_t.dtype == torch.float32


def test_independent_rows_share_nothing():
    given = batch(3)
    points = Independent()(given, V)
    noise = noise_of(points, V, given.latents)
    assert len(set(points.t.tolist())) == 3
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert abs(torch.corrcoef(torch.stack([noise[a].flatten(), noise[b].flatten()]))[0, 1]) < 0.35


def test_single_images_get_the_noise_that_their_pairs_get():
    given = batch(6)
    pairs, singles = Paired()(given, V), Independent()(replace(batch(3), latents=given.latents[:3]), V)
    assert pairs.t[:3].tolist() == singles.t.tolist()
    assert torch.equal(pairs.x_t[:3], singles.x_t)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_draw_gives_the_same_points_whatever_its_batch(place):
    together = Paired()(batch(6), V)
    given = batch(6)
    alone = replace(
        batch(2, DRAWS[place : place + 1]), latents=given.latents[[place, place + 3]], cond={"text": torch.zeros(2)}
    )
    points = Paired()(alone, V)
    assert torch.equal(points.x_t, together.x_t[[place, place + 3]])
    assert torch.equal(points.t, together.t[[place, place + 3]])
    assert torch.equal(points.target, together.target[[place, place + 3]])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_points_are_what_diffusers_would_make(kind):
    given, schedule, theirs = batch(6), from_scheduler_config({"prediction_type": kind}), DDPMScheduler()
    points = Paired()(given, schedule)
    noise = noise_of(points, schedule, given.latents)
    torch.testing.assert_close(points.x_t, theirs.add_noise(given.latents, noise, points.t))
    expected = noise if kind == "epsilon" else theirs.get_velocity(given.latents, noise, points.t)
    torch.testing.assert_close(points.target, expected, atol=2e-5, rtol=1e-4)


def test_noise_is_standard_normal():
    given = replace(batch(1, (5,)), latents=torch.zeros(1, 4, 64, 64))
    noise = Independent()(given, DiffusionSchedule(torch.tensor([0.0]), "epsilon")).x_t
    assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03


def test_conditioning_labels_and_weights_pass_through():
    given = batch(6)
    points = Paired()(given, V)
    assert points.cond is given.cond and points.label is given.label and points.weight is given.weight


def test_the_wrong_kind_of_batch_is_refused():
    with pytest.raises(ValueError, match="2 rows an item, not 3 for 3"):
        Paired()(batch(3), V)
    with pytest.raises(ValueError, match="1 row an item, not 6 for 3"):
        Independent()(batch(6), V)
