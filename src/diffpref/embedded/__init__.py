"""The embedded default: a small world, its judge, a base model trained on it and preferences over its samples."""

from pathlib import Path

HOME = Path(__file__).parent
MODEL = HOME / "model"  # a diffusers pipeline folder
PREFERENCES = HOME / "preferences"  # parquet in the Pick-a-Pic schema
PROMPTS = HOME / "heldout_prompts.txt"  # one a line; their compositions stand in no pair
