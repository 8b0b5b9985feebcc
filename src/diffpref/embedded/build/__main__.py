"""Make the embedded default again: `python -m diffpref.embedded.build {base,preferences,all} [--folder DIR]`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffpref import embedded
from diffpref.presets.embedded import GUIDANCE_SCALE, INFERENCE_STEPS, SAMPLER


@dataclass(frozen=True)
class Options:
    """Train the embedded base model, then sample and judge its preference set."""

    stage: Annotated[Literal["base", "preferences", "all"], tyro.conf.Positional] = "all"
    folder: Path = Path("build/embedded")
    """Where model/, preferences/ and heldout_prompts.txt go; the package holds them in diffpref/embedded/."""
    seed: int = 7
    steps: int = 3000
    """Batches of 128 that the base model is trained on."""
    pairs: int = 3000


def main() -> None:
    options = tyro.cli(Options)
    model = options.folder / embedded.MODEL.name
    if options.stage in ("base", "all"):
        from diffpref.embedded.build.base import build_base

        build_base(model, options.seed, options.steps)
    if options.stage in ("preferences", "all"):
        import torch

        from diffpref.embedded.build.preferences import write_heldout_prompts, write_preferences
        from diffpref.models.loading import load_backbone
        from diffpref.sampling import Sampling
        from diffpref.train.config import ModelConfig

        write_heldout_prompts(options.folder / embedded.PROMPTS.name, options.seed)
        backbone = load_backbone(ModelConfig(pretrained=str(model)), torch.device("cpu"), torch.float32, False)
        how = Sampling(SAMPLER, INFERENCE_STEPS, GUIDANCE_SCALE)
        write_preferences(backbone, options.folder / embedded.PREFERENCES.name, options.seed, options.pairs, how)


if __name__ == "__main__":
    main()
