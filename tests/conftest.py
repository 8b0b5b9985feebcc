"""What every test starts from: one thread, no network, fresh accelerate state."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """accelerate keeps its settings for the life of the process; each test is to choose its own."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
