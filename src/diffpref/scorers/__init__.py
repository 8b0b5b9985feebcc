"""Reward models: one module each, which exposes `load(device) -> Scorer`. The module's name is the scorer's name."""
