"""Training: the configuration, the loop, checkpoints, optimizers, validation and what a run folder holds."""
