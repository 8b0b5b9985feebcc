"""Weights are found, named, read without running code, and fit their network or say what does not."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffpref.errors import UserError
from diffpref.scorers.parts import weights


def tensors() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, -1.0])}


class Small(nn.Linear):
    """A linear layer with a buffer that checkpoints do not hold."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_buffer("places", torch.arange(4), persistent=False)


class Ran:
    """What a hostile file would hold: unpickling it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.write_text, (self.file, "ran")


def same(given: dict[str, torch.Tensor]) -> bool:
    return given.keys() == tensors().keys() and all(torch.equal(given[name], tensors()[name]) for name in given)


def test_a_file_a_folder_and_what_is_missing(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert weights.find(str(file), ["anything"], "x") == file
    assert weights.find(str(tmp_path), weights.MODEL_FILES, "x") == file
    assert weights.look(str(tmp_path), ["vocab.json"], "x") is None
    with pytest.raises(UserError, match=r"x: .* has none of a\.pt, b\.pt; it has model.safetensors, pytorch_model.bin"):
        weights.find(str(tmp_path), ["a.pt", "b.pt"], "x")


@pytest.mark.parametrize("place", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_place_that_is_none(place: str):
    with pytest.raises(UserError, match="is no file, no folder and no hub id"):
        weights.find(place, ["model.safetensors"], "x")


def test_the_hub_out_of_reach_is_one_line():
    with pytest.raises(UserError, match=r"x: nobody/nothing, \S+, is no file.*NAME=WEIGHTS") as caught:
        weights.find("nobody/nothing", ["model.safetensors", "pytorch_model.bin"], "x")
    assert "\n" not in str(caught.value)


def test_the_hubs_cache_is_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = "0" * 40
    snapshot = tmp_path / "models--some--body" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--body" / "refs").mkdir()
    (tmp_path / "models--some--body" / "refs" / "main").write_text(commit)
    torch.save(tensors(), snapshot / "pytorch_model.bin")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = weights.find("some/body", weights.MODEL_FILES, "x")
    assert found == snapshot / "pytorch_model.bin"
    assert same(weights.read(found, "x"))


@pytest.mark.parametrize("form", ["safetensors", "pt", "legacy.pt", "nested.pt", "module.pt", "positions.pt"])
def test_every_form_of_file_is_read(form: str, tmp_path: Path):
    file = tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file(tensors(), file)
    elif form == "legacy.pt":
        torch.save(tensors(), file, _use_new_zipfile_serialization=False)
    else:
        content = {
            "pt": tensors(),
            "nested.pt": {"epoch": 3, "state_dict": tensors()},
            "module.pt": {f"module.{name}": value for name, value in tensors().items()},
            "positions.pt": tensors() | {"text.embeddings.position_ids": torch.arange(77)},
        }
        torch.save(content[form], file)
    assert same(weights.read(file, "x"))


def test_shards_are_one_file(tmp_path: Path):
    for number, (name, value) in enumerate(tensors().items()):
        save_file({name: value}, tmp_path / f"model-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "model-0.safetensors", "bias": "model-1.safetensors"}}))
    assert same(weights.read(index, "x"))
    before = weights.digest(index)
    save_file({"bias": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    assert weights.digest(index) != before
    index.write_text("[]")
    with pytest.raises(UserError, match=r"index\.json cannot be read as an index"):
        weights.read(index, "x")


@pytest.mark.parametrize("new", [True, False])
def test_a_file_with_code_is_refused_and_nothing_runs(new: bool, tmp_path: Path):
    file, trace = tmp_path / "weights.pth", tmp_path / "trace"
    torch.save({"weight": Ran(trace)}, file, _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"x: .*weights\.pth is refused.*safetensors") as caught:
        weights.read(file, "x")
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()


def test_a_pickled_module_is_refused(tmp_path: Path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError, match="is refused"):
        weights.read(tmp_path / "module.pt", "x")


@pytest.mark.parametrize("content", [[1, 2], {}, {"weight": 3}, {"weight": tensors()}])
def test_what_holds_no_tensors_by_name_is_refused(content: object, tmp_path: Path):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"odd\.pt holds"):
        weights.read(tmp_path / "odd.pt", "x")


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt"])
def test_a_damaged_file_is_one_line(name: str, tmp_path: Path):
    file = tmp_path / name
    save_file(tensors(), file) if name.endswith("safetensors") else torch.save(tensors(), file)
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(UserError, match=rf"x: .*{name}") as caught:
        weights.read(file, "x")
    assert "\n" not in str(caught.value)


def test_unknown_weights_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "odd.pt"
    file.write_bytes(b"an odd file")
    total = hashlib.sha256(b"an odd file").hexdigest()
    assert weights.digest(file) == total
    with caplog.at_level(logging.WARNING, "diffpref"):
        assert weights.label(file, total, {total: "owner/name"}, "x") == "owner/name"
        assert not caplog.records
        assert [weights.label(file, total, {}, "x") for _ in range(3)] == ["odd.pt"] * 3
    assert [total in record.getMessage() for record in caplog.records] == [True]


def test_a_network_is_built_of_its_weights_alone():
    network = weights.build(Small, tensors(), "x: file", torch.float32, "cpu")
    assert torch.equal(network(torch.ones(1, 3)), torch.tensor([[4.0, 11.0]]))
    assert torch.equal(network.get_buffer("places"), torch.arange(4))
    assert not network.training
    assert not network.weight.requires_grad
    assert weights.build(Small, tensors(), "x: file", torch.bfloat16, "cpu").weight.dtype == torch.bfloat16


def test_weights_that_do_not_fit_name_the_first_key():
    wrong = tensors() | {"weight": torch.zeros(2, 4)}
    with pytest.raises(UserError, match=r"x: file: weight has the shape \(2, 4\), where \(2, 3\) is expected"):
        weights.build(Small, wrong, "x: file", torch.float32, "cpu")
    with pytest.raises(UserError, match="1 keys missing, the first bias; 2 keys unexpected, the first scale"):
        others = {"weight": torch.zeros(2, 3), "scale": torch.zeros(1), "shift": torch.zeros(1)}
        weights.build(Small, others, "x: file", torch.float32, "cpu")


def test_half_precision_on_a_cpu_is_refused():
    assert weights.dtype_of("bf16", "cpu") == torch.bfloat16
    assert weights.dtype_of("fp16", "cuda") == torch.float16
    with pytest.raises(UserError, match="fp16 does not run on a CPU"):
        weights.dtype_of("fp16", "cpu")
