"""Perturbers: one module each. The module's name is the perturber's name; `modules.py` says what it exposes."""
