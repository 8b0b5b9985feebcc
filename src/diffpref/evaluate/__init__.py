"""Measure what a model makes: read folders of images, score them, and compare two of them pair by pair."""
