"""The objectives that came after Diffusion-DPO, with what their authors published, each in its own convention of beta.

Where a value is not published for a model, it is Diffusion-DPO's. docs/objectives.md converts betas; ours of KTO and of
NPO on SD1.5 are twice the published numbers, whose code has no factor 1/2.
"""

from dataclasses import replace
from typing import Any

from diffpref.objectives import DMPO, DPO, DSPO, KTO, LinearDPO, MaPO, Objective, SmPO
from diffpref.points import Independent, Inverted
from diffpref.presets import sd15, sdxl
from diffpref.train.config import Config

_SD15, _SDXL = sd15.PRESETS["sd15-dpo"], sdxl.PRESETS["sdxl-dpo"]
_PICKSCORE_RANGE = 0.1665804461  # greatest less least PickScore (as a cosine) of Pick-a-Pic v2, in SmPO's train.py


def _method(name: str, base: Config, objective: Objective, **train: Any) -> Config:
    return replace(base, output_dir=f"runs/{name}", objective=objective, train=replace(base.train, **train))


def _constant(rate: float, batch: int, accumulation: int, steps: int, warmup: int = 0) -> dict[str, Any]:
    """A constant rate that is not multiplied by the batch."""
    return {
        "learning_rate": rate,
        "scale_lr": False,
        "lr_warmup_steps": warmup,
        "batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
    }


def _short(steps: int, warmup: int) -> dict[str, Any]:
    return {"max_steps": steps, "lr_warmup_steps": warmup, "batch_size": 1, "gradient_accumulation_steps": 1024}


def _single(base: Config) -> Config:
    return replace(base, points=Independent())


def _inverted(base: Config, **points: Any) -> Config:
    return replace(base, points=Inverted(**points))


def _scored(base: Config) -> Config:
    data = replace(base.data, choice_model="pickscore", choice_temperature=_PICKSCORE_RANGE)
    return replace(base, data=data)


def _negative(base: Config) -> Config:
    data = replace(base.data, swap=True, prompt_dropout=0.0)
    return replace(base, model=replace(base.model, lora_rank=8), data=data)


PRESETS = {
    # jacklishufan/diffusion-kto: batch 8, 20,000 steps; beta 1000 there
    "sd15-kto": _method("sd15-kto", _single(_SD15), KTO(beta=2000.0), **_constant(1e-7, 4, 2, 20000, 200)),
    # DSPO's train.py, of which SD1.5's loss is taken for every model
    "sd15-dspo": _method("sd15-dspo", _SD15, DSPO(beta=0.001), max_steps=1000),
    "sdxl-dspo": _method("sdxl-dspo", _SDXL, DSPO(beta=0.001), max_steps=700),
    # mapo-t2i/mapo
    "sdxl-mapo": _method(
        "sdxl-mapo",
        replace(_SDXL, data=replace(_SDXL.data, prompt_dropout=0.0)),
        MaPO(),
        optimizer="adamw",
        **_constant(1e-5, 8, 2, 2000),
    ),
    # AIDC-AI/Diffusion-SDPO
    "sd15-dmpo": _method("sd15-dmpo", _SD15, DMPO(beta=2000.0)),
    "sdxl-dmpo": _method("sdxl-dmpo", _SDXL, DMPO(beta=6000.0), learning_rate=1e-9, lr_warmup_steps=500),
    # Whynot0101/Linear-DPO; its SD1.5 script moves the reference, with decays of 0.95, 0.99 and 0.995
    "sd15-linear-dpo": _method(
        "sd15-linear-dpo", _SD15, LinearDPO(), reference_decay=0.99, **_constant(5e-6, 4, 32, 2000)
    ),
    "sdxl-linear-dpo": _method(
        "sdxl-linear-dpo", _SDXL, LinearDPO(beta=500.0, eta=0.0), optimizer="adamw", **_constant(1e-5, 1, 128, 2000)
    ),
    # JaydenLyh/InPO and JaydenLyh/SmPO, in batches of 1024; there they start from weights fine-tuned on chosen images
    "sd15-inpo": _method("sd15-inpo", _inverted(_SD15), DPO(beta=2000.0), **_short(400, 200)),
    "sdxl-inpo": _method("sdxl-inpo", _inverted(_SDXL), DPO(beta=5000.0), **_short(400, 200)),
    "sd15-smpo": _method(
        "sd15-smpo",
        _inverted(_scored(_SD15), method="renoise", stride=200, eta=0.0),
        SmPO(beta=2000.0),
        **_short(200, 100),
    ),
    "sdxl-smpo": _method(
        "sdxl-smpo",
        _inverted(_scored(_SDXL), method="renoise", stride=100, eta=0.0),
        SmPO(beta=5000.0),
        **_short(200, 100),
    ),
    # G-U-N/Diffusion-NPO: the negative model of guidance; beta 500 there on SD1.5
    "sd15-npo-lora": _method("sd15-npo-lora", _negative(_SD15), DPO(beta=1000.0), **_constant(5e-6, 4, 16, 2000)),
    "sdxl-npo-lora": _method(
        "sdxl-npo-lora", _negative(_SDXL), DPO(beta=2000.0), optimizer="adamw", **_constant(5e-6, 2, 30, 2000)
    ),
    # SPIN-Diffusion (arXiv 2402.10210): pairs of an expert image and one by the former iterate, from whose weights it
    # starts; the authors name no beta
    "sd15-spin": _method(
        "sd15-spin",
        replace(_SD15, data=replace(_SD15.data, path="data/spin-pairs", holdout=0.0)),
        DPO(beta=5000.0),
        lr_scheduler="linear",
        **_constant(2e-5, 8, 256, 500, 200),
    ),
}
