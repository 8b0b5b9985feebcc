"""Stable Diffusion 1.5: the settings of the Diffusion-DPO paper (arXiv 2311.12908, section 5.1 and its code).

The learning rate is 1e-8 times the effective batch of 2048 pairs; `batch_size` and `gradient_accumulation_steps` give
2048 on one process: with more processes, divide the accumulation by their number.
"""

from dataclasses import replace

from diffpref.objectives import DPO, SFT
from diffpref.points import Independent
from diffpref.train.config import Config, DataConfig, ModelConfig, TrainConfig, ValidationConfig

_PAPER = Config(
    output_dir="runs/sd15-dpo",
    model=ModelConfig(pretrained="stable-diffusion-v1-5/stable-diffusion-v1-5"),
    data=DataConfig(path="data/pickapic", resolution=512, flip=True, prompt_dropout=0.2, holdout=0.005),
    objective=DPO(beta=5000.0),
    train=TrainConfig(
        max_steps=2000,
        batch_size=4,
        gradient_accumulation_steps=512,
        learning_rate=1e-8,
        scale_lr=True,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=500,
        mixed_precision="bf16",
        checkpointing_steps=100,
    ),
    validation=ValidationConfig(steps=100),
)
# LoRA learns at a much higher rate than full fine-tuning, so a smaller batch and fewer images do.
_LORA = replace(
    _PAPER,
    output_dir="runs/sd15-dpo-lora",
    model=replace(_PAPER.model, lora_rank=16),
    train=replace(
        _PAPER.train,
        gradient_accumulation_steps=16,
        learning_rate=1e-5,
        scale_lr=False,
        lr_warmup_steps=100,
    ),
)

PRESETS = {
    "sd15-dpo": _PAPER,
    "sd15-dpo-lora": _LORA,
    "sd15-sft": replace(_PAPER, output_dir="runs/sd15-sft", objective=SFT(), points=Independent()),
}
