"""What every test starts from: one thread, no network, fresh accelerate state."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a job that a shell runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Check the types and shapes of every call. Configuration records name tensor types without importing torch, so
# objectives and points cannot be checked themselves; what they take and give is.
CHECKED = ("data", "draws", "embedded", "evaluate", "models", "reference", "report", "sampling", "schedules")
CHECKED += ("captioners", "language", "perturbers", "scorers", "solvers", "train", "types")
install_import_hook([f"diffpref.{name}" for name in CHECKED], "typechecker.check")


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """accelerate keeps its settings for the life of the process; each test is to choose its own."""
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A tiny random pipeline folder. Tests only read it."""
    from support.tiny import make_pipeline

    return make_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def v_pipeline(tmp_path_factory):
    """The same kind of folder with a model that predicts the velocity."""
    from support.tiny import make_pipeline

    return make_pipeline(tmp_path_factory.mktemp("tiny-v") / "pipeline", seed=1, prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory):
    """A dataset of 24 pairs in the normal form."""
    from support.tiny import make_pairs, write_pairs

    return write_pairs(tmp_path_factory.mktemp("tiny") / "pairs", make_pairs(24))


@pytest.fixture
def forwards(monkeypatch):
    """Notes each forward of a U-Net: whether gradients were on."""
    from diffusers import UNet2DConditionModel

    noted, original = [], UNet2DConditionModel.forward

    def forward(self, *args, **kwargs):
        noted.append(torch.is_grad_enabled())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    return noted
