"""The typed configuration: what a preset is a value of, `--config` reads and `--print-config` writes.

Importing this imports no torch, so that `--help` answers at once. Keys follow diffusers' spelling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from diffpref.objectives import DPO, Objective
from diffpref.points import Paired, Placement


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and which of its weights."""

    pretrained: str = "embedded"
    """A pipeline folder, a hub id, or `embedded`. Its model_index.json names the family."""
    variant: Literal["base", "turbo", "refiner"] = "base"
    """Of SDXL: `turbo` trains at four timesteps under a zero-terminal-SNR schedule, `refiner` at times below 200."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    vae: str | None = None
    """Another VAE: a folder, or a pipeline folder or hub id that holds one."""
    unet: str | None = None
    """Start from another U-Net or transformer: a folder, or a pipeline folder or hub id that holds one."""
    lora: tuple[str, ...] = ()
    """LoRA weights to fuse into the network before anything else: files, or final/ folders of runs."""
    lora_scales: tuple[float, ...] = ()
    """What each of them is multiplied by; 1 when not given."""
    lora_rank: int = 0
    """Rank of the trained LoRA adapters; 0 trains the whole network."""
    lora_alpha: int | None = None
    """LoRA scaling numerator; the rank when not given."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the layers that get adapters."""
    guidance_embedding: float = 1.0
    """The guidance scale that a network which takes one as an input (FLUX.1-dev) is trained at."""
    max_text_length: int = 0
    """Tokens of the long text encoder (SD3, FLUX, Qwen-Image); 0 takes the family's own limit."""


@dataclass(frozen=True)
class DataConfig:
    """Which preferences are trained on, and how they are read."""

    path: str = "embedded"
    """A dataset in the normal form (see `diffpref data import`), `embedded`, `embedded-experts`, or
    `embedded-expert-pairs`."""
    split: str = "train"
    """Which split of it."""
    holdout: float = 0.0
    """Share of the prompts kept out of training, on whose pairs the held-out accuracy is measured."""
    resolution: int = 512
    """Side of the training images in pixels."""
    buckets: bool = False
    """Train at shapes near those of the images instead of squares: sides are multiples of a step, and no shape has
    more pixels than the square of `resolution`."""
    bucket_step: int = 64
    """Sides of buckets are multiples of so many pixels, and the resolution must be one."""
    bucket_max_aspect: float = 2.5
    """One side of a bucket is at most so many times the other; longer images lose their ends."""
    crop: Literal["center", "random", "none"] = "center"
    """`center`: scaled to cover the square or bucket, then its middle; `random`: any such part of it, which needs
    `cache: none`; `none`: squeezed to the shape."""
    flip: bool = False
    """Mirror half of the images. Leave off where captions say left or right."""
    augmentation: Literal["shared", "independent"] = "shared"
    """Whether both images of a pair are mirrored and cropped alike, or each on its own as in the published script."""
    captions: Literal["prompt", "image"] = "prompt"
    """What conditions a pair: its one prompt, or each image's own caption (DCPO)."""
    choice_model: str | None = None
    """Order pairs by this scorer's columns chosen_score_NAME and rejected_score_NAME instead of by the label."""
    choice_temperature: float | None = None
    """Labels of `choice_model` are sigmoid(score difference / this), as in SmPO; 1 or 0 when not given."""
    generator: str | None = None
    """Train only on pairs both of whose generators' names contain this."""
    swap: bool = False
    """Take the rejected image for the chosen one: trains the negative model of NPO."""
    weighting: Literal["none", "margin"] = "none"
    """`margin`: multiply each pair's weight by its margin column over that column's mean."""
    prompt_dropout: float = 0.0
    """Probability that a pair's prompts are replaced by the empty one, both alike."""
    ties: Literal["drop", "random", "soft"] = "drop"
    """Pairs of label 0.5: left out, given a winner by the seed, or trained on with the label 0.5."""
    latents: Literal["mean", "moments"] = "mean"
    """The VAE's posterior: its mean always, or a sample of it at every step, as the published scripts take (which
    stores mean and variance, twice the room)."""
    shuffle: Literal["full", "block"] = "full"
    """Order of an epoch: any item anywhere, or blocks of neighbouring rows in any order and their items mixed over
    eight blocks, for stores whose far reads are slow."""
    shuffle_block: int = 4096
    """Items of such a block."""
    cache: str | None = None
    """Folder of the latent store; beside the dataset (PATH.cache) when not given; `none` encodes at every step."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimization."""

    max_steps: int = 2000
    """Optimizer steps of the whole run."""
    batch_size: int = 1
    """Pairs (or single images) per process and micro-step."""
    gradient_accumulation_steps: int = 1
    """Micro-steps whose gradients make one optimizer step."""
    micro_batch: int | Literal["auto"] | None = None
    """How many of these batch_size x gradient_accumulation_steps items go through the networks at once, a divisor;
    `auto` finds by trying the most that the memory takes; batch_size when not given. It changes nothing but time and
    memory."""
    halve_on_out_of_memory: bool = True
    """Where memory runs out in a step, take it again with half as many items at once. With one process alone."""
    process_timeout: float = 1800.0
    """Seconds for which processes of a run wait for one another; then they take the others for hung, and end."""
    learning_rate: float = 1e-8
    """The learning rate after warm-up."""
    scale_lr: bool = False
    """Multiply the learning rate by the effective batch (processes x batch x accumulation)."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """How the learning rate changes with the step; diffusers' schedule of that name."""
    lr_warmup_steps: int = 0
    """Steps over which the rate rises from 0; `constant` ignores it."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "schedule_free"] = "adamw"
    """torch's fused AdamW, its 8-bit form (extra `8bit`), Adafactor without relative step, or schedule-free AdamW
    (extra `schedule-free`)."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """What AdamW adds to the denominator."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 never."""
    skip_spikes: float | None = None
    """Do not apply a step whose loss or gradient norm is above so many times the median of the last 64 steps, from the
    16th step on; when not given, only those that are not finite are left out."""
    deterministic: bool = False
    """Take only operations that give the same bits each time, and no TF32: slower on a GPU, and without this its runs
    differ in their last bits."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward pass and of weights that do not train. What trains is fp32 always; `fp16` needs a
    GPU."""
    snr_gamma: float | None = None
    """Weigh errors by min-SNR with this gamma (the paper's is 5); none when not given."""
    sdpo_mu: float | None = None
    """Safeguard of Diffusion-SDPO on any objective of pairs: 0.9 for SD1.5, 0.6 for SDXL; none when not given."""
    reference_decay: float | None = None
    """The reference follows the policy as an average with this decay (Linear-DPO); it stands still when not given."""
    reference_cache: int = 0
    """Draws (time, noise, mirroring, prompt drop) that each item has, in turn; the reference's errors at them are
    computed once, kept beside the latents and used by every run with the same reference and data. 0 draws anew each
    time and runs the reference in each step."""
    ema: bool = False
    """Keep an exponential moving average of what trains; `final/` and validation images are of it."""
    ema_decay: float = 0.9999
    """Its decay, reached by (1 + step) / (10 + step)."""
    offload_ema: bool = False
    """Keep the average in the CPU's memory: 4 bytes a trained parameter less on the GPU, which waits for it at each
    step."""
    gradient_checkpointing: bool | Literal["selective"] = False
    """Compute activations again in the backward pass: less memory, more time. `selective` does so where it saves most
    for its time: in a U-Net's blocks of the highest resolution, in every second block of a transformer."""
    compile: bool = False
    """Compile the blocks of the networks (torch.compile): minutes at the start, faster steps. For GPUs."""
    channels_last: bool | None = None
    """Keep U-Nets' convolutions with their channels last in memory; when not given, on a GPU."""
    checkpointing_steps: int = 500
    """Steps between checkpoints; 0 writes none but the last."""
    checkpoints_total_limit: int = 2
    """So many of the newest stay; older ones are removed once a new one is complete. 0 keeps all."""
    checkpoints_keep_every: int = 0
    """Those of a multiple of so many steps stay too, however old; 0 keeps none for that."""
    logging_steps: int = 1
    """Steps between lines of `metrics.jsonl`; the last step is logged always."""
    seed: int = 0
    """Fixes the order of samples, their times, noises, flips and prompt drops, and the adapters' first values."""


@dataclass(frozen=True)
class ValidationConfig:
    """What is looked at during training."""

    steps: int = 0
    """Steps between validations; 0 validates at the end alone."""
    pairs: int = 256
    """At most so many held-out pairs are measured."""
    prompts: str | None = None
    """Prompts to draw images for, in any form that `generate --prompts` reads, or `embedded`; none when not given."""
    images: int = 8
    """How many of these prompts."""
    scorer: str | None = None
    """Score the validation images by these reward models, with commas between them; none when not given. By the first
    one's mean the best checkpoint is marked, in `checkpoints/best.json`."""
    keep_best: bool = True
    """Write a checkpoint of every step whose score is the best so far, and keep it until a better one comes."""
    sampler: Literal["ddpm", "ddim", "dpmsolver++", "euler", "flow"] = "ddim"
    """The sampler of the validation images; `flow` is that of SD3, FLUX and Qwen-Image."""
    num_inference_steps: int = 50
    """Its number of steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 or below is none."""
    seed: int = 0
    """Fixes the noise of validation images, and times and noises of the held-out pairs."""


@dataclass(frozen=True)
class GuardConfig:
    """What happens when training leaves the images that people prefer."""

    action: Literal["off", "warn", "stop", "rollback"] = "warn"
    """`stop` ends the run, `rollback` goes back to the last good checkpoint and halves the learning rate."""
    share: float = 0.25
    """The chosen images' error may exceed the reference's by this share."""
    steps: int = 50
    """For fewer than so many optimizer steps in a row."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    output_dir: str = "runs/run"
    """The run folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Objective = field(default_factory=DPO)
    points: Placement = field(default_factory=Paired)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
