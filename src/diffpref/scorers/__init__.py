"""Reward models: one module each, which exposes `load(weights, device, precision) -> Scorer`, and their parts.

The module's name is the scorer's name.
"""
