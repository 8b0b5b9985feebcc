"""The recipes: presets are values of the typed configuration, named <family>-<method>[-lora]."""

from diffpref.errors import UserError, nearest
from diffpref.presets import embedded, sd15
from diffpref.train.config import Config

PRESETS: dict[str, Config] = {**embedded.PRESETS, **sd15.PRESETS}


def preset(name: str) -> Config:
    """The preset of a name; raises UserError with the nearest name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: {nearest(name, PRESETS)}")
    return PRESETS[name]
