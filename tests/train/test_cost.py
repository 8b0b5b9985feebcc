"""What a step costs: one reference forward a micro-step, none without a reference, and no hidden work."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from support.runs import tiny_config, with_lora
from torch.utils.flop_counter import FlopCounterMode

from diffpref.data.ahead import Ahead
from diffpref.models.loading import load_backbone
from diffpref.objectives import DPO, SFT
from diffpref.points import Independent
from diffpref.reference import adapters_off, frozen_copy
from diffpref.train.optimizers import make_optimizer
from diffpref.train.placing import make_placer
from diffpref.train.preferences import open_preferences
from diffpref.train.reference_cache import with_reference_errors
from diffpref.train.step import Learner
from diffpref.train.strategy import Replicated

DPO_100 = DPO(beta=100.0)


@pytest.fixture
def learner_of(pipeline, tiny_pairs, tmp_path):
    """Builds a learner, its optimizer, and a list that notes each forward: whether it kept a graph."""

    def build(lora: bool = False, objective=DPO_100, micros: int = 1, cached: bool = False, **points):
        config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", gradient_accumulation_steps=micros)
        config = replace(with_lora(config) if lora else config, objective=objective, **points)
        accelerator = Accelerator(cpu=True)
        backbone = load_backbone(config.model, accelerator.device, torch.float32, trainable=True)
        loader = open_preferences(config, backbone, accelerator)[0]
        reference = None
        if cached:
            config = replace(config, train=replace(config.train, reference_cache=1))
            loader, _ = with_reference_errors(config, backbone, accelerator, loader, None)
        elif objective.needs_reference:
            reference = adapters_off(backbone) if lora else frozen_copy(backbone)
        optimizer = make_optimizer([p for p in backbone.net.parameters() if p.requires_grad], config.train)
        place = make_placer(config.points, backbone, reference, config.train, accelerator)
        return Learner(
            accelerator, Replicated(accelerator), backbone, reference, place, Ahead(loader), objective, config.train
        ), optimizer

    return build


@pytest.mark.parametrize("lora", [False, True])
def test_one_reference_forward_a_micro_step(learner_of, forwards, lora):
    learner, optimizer = learner_of(lora, micros=3)
    learner.step(0, optimizer)
    assert forwards == [False, True] * 3


def test_without_a_reference_there_is_none(learner_of, forwards):
    learner, optimizer = learner_of(objective=SFT(), points=Independent(), micros=2)
    learner.step(0, optimizer)
    assert forwards == [True, True]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_is_policy_forward_and_backward_and_reference_forward(learner_of, lora, cached):
    learner, optimizer = learner_of(lora, micros=2, cached=cached)
    with FlopCounterMode(display=False) as step:
        learner.step(0, optimizer)
    points = learner.look(0, 0).points
    with FlopCounterMode(display=False) as reference:
        if not cached:
            learner.reference(points.x_t, points.t, points.cond)
    with FlopCounterMode(display=False) as policy:
        learner.policy.predict(points.x_t, points.t, points.cond).square().mean().backward()
    expected = 2 * (reference.get_total_flops() + policy.get_total_flops())
    assert policy.get_total_flops() > 1.9 * reference.get_total_flops() and (reference.get_total_flops() == 0) == cached
    assert step.get_total_flops() == pytest.approx(expected, rel=0.01)
