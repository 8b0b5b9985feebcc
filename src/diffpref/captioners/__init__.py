"""Captioners: one module each. The module's name is the captioner's name; `modules.py` says what it exposes."""
