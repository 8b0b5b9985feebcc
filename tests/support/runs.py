"""A tiny run that every training test can start: a random pipeline, a few pairs, two cheap steps a second."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffpref.objectives import DPO
from diffpref.train.config import Config, DataConfig, ModelConfig, TrainConfig, ValidationConfig
from diffpref.train.loop import train
from diffpref.train.run_folder import SPEEDS


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


def finals(run: Path) -> list[torch.Tensor]:
    """The trained weights in a run's final/: of the whole U-Net, or of its adapters."""
    final = run / "final"
    lora = final / "pytorch_lora_weights.safetensors"
    file = lora if lora.is_file() else final / "unet" / "diffusion_pytorch_model.safetensors"
    return [value for _, value in sorted(load_file(file).items())]


def logged(run: Path) -> list[dict]:
    """The logged training steps of a run, without their speed."""
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in metrics(run)]


def assert_resumes_bit_for_bit(config: Config, tmp_path: Path, cut: int) -> Path:
    """A run cut after step `cut` and taken up again ends as the uncut one."""
    whole = train(config)
    again = replace(config, output_dir=str(tmp_path / "cut"))
    shutil.copytree(whole, tmp_path / "cut")
    (tmp_path / "cut" / "config.yaml").write_text(
        (whole / "config.yaml").read_text().replace(str(whole), again.output_dir)
    )
    shutil.rmtree(tmp_path / "cut" / "final")
    for folder in (tmp_path / "cut" / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > cut:
            shutil.rmtree(folder)
    resumed = train(again, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(finals(whole), finals(resumed), strict=True))
    assert logged(whole) == logged(resumed)
    return whole
