"""A tiny run that every training test can start: a random pipeline, a few pairs, two cheap steps a second."""

import json
from dataclasses import replace
from pathlib import Path

from diffpref.objectives import DPO
from diffpref.train.config import Config, DataConfig, ModelConfig, TrainConfig, ValidationConfig


def tiny_config(pipeline: Path, pairs: Path, output: Path, **train: object) -> Config:
    """A DPO run in fp32 on the tiny pipeline; `train` overrides keys of its group."""
    settings = {
        "max_steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 0,
        "seed": 3,
    }
    return Config(
        output_dir=str(output),
        model=ModelConfig(pretrained=str(pipeline)),
        data=DataConfig(path=str(pairs), resolution=32, prompt_dropout=0.2, flip=True, cache=f"{pairs}.cache"),
        objective=DPO(beta=100.0),
        train=TrainConfig(**{**settings, **train}),
        validation=ValidationConfig(num_inference_steps=2),
    )


def with_lora(config: Config) -> Config:
    """The same run on adapters of rank 4."""
    return replace(config, model=replace(config.model, lora_rank=4))


def metrics(run: Path) -> list[dict]:
    """The logged training steps of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
