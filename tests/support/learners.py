"""A learner as the loop makes one, for tests of single steps."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffpref.data.ahead import Ahead
from diffpref.models.loading import load_backbone
from diffpref.reference import adapters_off, frozen_copy
from diffpref.train.config import Config
from diffpref.train.optimizers import make_optimizer
from diffpref.train.placing import make_placer
from diffpref.train.preferences import open_preferences
from diffpref.train.run_folder import RunFolder
from diffpref.train.state import RunState
from diffpref.train.step import Learner


def learner_for(config: Config, cpu: bool = True) -> tuple[Learner, Any, RunState]:
    """The learner of a run, its optimizer and its state."""
    accelerator = Accelerator(cpu=cpu)
    torch.manual_seed(config.train.seed)
    backbone = load_backbone(config.model, accelerator.device, torch.float32, trainable=True)
    loader = open_preferences(config, backbone, accelerator)[0]
    reference = None
    if config.objective.needs_reference:
        reference = adapters_off(backbone) if config.model.lora_rank else frozen_copy(backbone)
    optimizer = make_optimizer([p for p in backbone.net.parameters() if p.requires_grad], config.train)
    place = make_placer(config.points, backbone, reference, config.train, accelerator)
    state = RunState(config, RunFolder(Path(config.output_dir)), accelerator, backbone, optimizer, place)
    learner = Learner(
        accelerator, backbone, reference, place, Ahead(loader), config.objective, config.train, state.spikes
    )
    return learner, optimizer, state
