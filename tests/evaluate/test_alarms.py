"""Alarms on made-up numbers: where they must ring and where they must not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffpref.evaluate.alarms import diversity_alarms, held_out_alarms
from diffpref.evaluate.pairing import Place
from diffpref.evaluate.results import Result, results_of
from diffpref.evaluate.spread import spread
from diffpref.evaluate.statistics import Estimate

FOLDERS = (Path("base"), Path("tuned"))
PROMPTS = [str(place) for place in range(60)]


class Named:
    version = "1"

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, images: list, prompts: list[str]) -> list[float]:
        raise AssertionError


def made(**shifts: float) -> list[Result]:
    """Results of scorers whose scores rise by so much in the mean, with a spread of one."""
    rng = np.random.default_rng(0)
    places = [Place(prompt, 0, None, None, FOLDERS) for prompt in PROMPTS]
    values = []
    for shift in shifts.values():
        noise = rng.normal(size=len(PROMPTS))
        values.append([np.zeros(len(PROMPTS)), noise - noise.mean() + shift])
    return results_of(FOLDERS, [Named(name) for name in shifts], places, np.array(values))


def test_it_rings_where_the_optimised_score_rises_and_a_held_out_one_falls():
    (alarm,) = held_out_alarms(made(reward=1.0, held_out=-1.0, still=0.0), "reward")
    assert (alarm.kind, alarm.folder) == ("held_out_falls", Path("tuned"))
    assert alarm.text.startswith("reward rises by +1 (95% interval +0.")
    assert "while held_out falls by -1 (95% interval -1." in alarm.text


@pytest.mark.parametrize(
    ("shifts", "optimised"),
    [
        ({"reward": 1.0, "held_out": 1.0}, "reward"),
        ({"reward": 1.0, "held_out": 0.0}, "reward"),
        ({"reward": 1.0, "held_out": -0.1}, "reward"),  # within its interval
        ({"reward": 0.1, "held_out": -1.0}, "reward"),
        ({"reward": -1.0, "held_out": -1.0}, "reward"),
        ({"reward": 1.0, "held_out": -1.0}, "held_out"),
        ({"reward": 1.0}, "reward"),
    ],
)
def test_it_keeps_silent(shifts: dict[str, float], optimised: str):
    assert held_out_alarms(made(**shifts), optimised) == []


def test_a_win_rate_above_one_half_is_a_rise_too():
    """Wins that are many and small beside losses that are few and large."""
    results = made(reward=0.0, held_out=-1.0)
    assert held_out_alarms(results, "reward") == []
    assert held_out_alarms([replace(results[0], win_rate_low=0.51), results[1]], "reward")
    assert not held_out_alarms([replace(results[0], win_rate_low=0.5), results[1]], "reward")


@pytest.mark.parametrize(("scale", "rings"), [(0.5, True), (0.75, True), (0.85, False), (1.0, False), (1.5, False)])
def test_diversity_that_falls_by_more_than_its_share_rings(scale: float, rings: bool):
    images = np.random.default_rng(0).normal(size=(120, 8))
    found = spread("made", "1", images, scale * images, [prompt for prompt in PROMPTS for _ in range(2)])
    alarms = diversity_alarms(Path("tuned"), found, 0.2)
    assert [alarm.kind for alarm in alarms] == ["diversity_falls"] * rings
    if rings:
        assert alarms[0].text.startswith(f"diversity falls by {1 - scale:.0%}, from ")
    assert bool(diversity_alarms(Path("tuned"), found, 0.1)) == (scale < 0.9)


def test_a_fall_that_may_be_chance_does_not_ring():
    images = np.random.default_rng(0).normal(size=(4, 3))
    found = spread("made", "1", images, 0.5 * images, ["a", "a", "b", "b"])
    assert diversity_alarms(Path("tuned"), found, 0.2)
    unsure = replace(found, diversity_difference=Estimate(-0.5, -1.2, 0.1))
    assert not diversity_alarms(Path("tuned"), unsure, 0.2)
