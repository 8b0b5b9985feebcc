"""The disk is full: what was complete stays, what was half written goes, and the line says how much was needed."""

import errno
import os
import re
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from support.runs import finals, logged, tiny_config

from diffpref.__main__ import main
from diffpref.errors import RunError, UserError
from diffpref.files import disk_full, made_beside, write_whole
from diffpref.models.network import Network
from diffpref.train import checkpoint
from diffpref.train.checkpoint import Checkpoint, newest
from diffpref.train.config_file import to_yaml
from diffpref.train.loop import train

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def files_of_at_most(size: int):
    """A real limit of this process: whatever writes more gets an error from the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def captured(step: int, numbers: int = 1000) -> Checkpoint:
    tensors = {"0.exp_avg": torch.ones(numbers)}
    return Checkpoint(step, {"w": torch.full((numbers,), float(step))}, tensors, {"state": {}}, {"guard": {}})


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path):
    checkpoint.save(tmp_path, captured(1), keep=1)
    with files_of_at_most(3000), pytest.raises(RunError) as error:
        checkpoint.save(tmp_path, captured(2), keep=1)
    assert re.fullmatch(
        r"the checkpoint of step 2 needs 8,000 bytes: no space left on the disk of \S+, where [\d,]+ bytes are free; "
        r"that of step 1 stays: make room \(train\.checkpoints_total_limit 1 keeps one at a time\), then add --resume",
        str(error.value),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    found, damaged = newest(tmp_path)
    assert found.step == 1 and not damaged and found.weights["w"][0] == 1


def test_what_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=7999))
    monkeypatch.setattr(checkpoint, "save_file", lambda *given: pytest.fail("it was begun"))
    with pytest.raises(RunError, match=r"needs 8,000 bytes: .* 7,999 bytes are free; there is none before it: "):
        checkpoint.save(tmp_path / "checkpoints", captured(1), keep=0)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_is_interrupted_while_it_is_written_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, captured(1), keep=0)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fills_the_disk_goes_on_when_there_is_room(pipeline, tiny_pairs, tmp_path, monkeypatch, capsys):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run")
    file, real = tmp_path / "config.yaml", checkpoint.save_file
    file.write_text(to_yaml(config))

    def full(tensors, path, *more):
        if "step-4" in str(path) and path.name == "optimizer.safetensors":
            Path(path).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        assert main(["train", "--config", str(file)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("diffpref: the checkpoint of step 4 needs ") and "that of step 2 stays" in line
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    resumed = train(config, resume=True)
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    assert all(torch.equal(a, b) for a, b in zip(finals(resumed), finals(whole), strict=True))
    assert logged(resumed) == logged(whole)


def test_no_room_for_a_line_of_metrics(pipeline, tiny_pairs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"^no space left on the disk of \S+run, where [\d,]+ bytes are free; what was "):
        train(tiny_config(pipeline, tiny_pairs, tmp_path / "run"))


def test_no_room_for_a_validation_image(pipeline, tiny_pairs, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a\n")
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=1)
    config = replace(config, validation=replace(config.validation, prompts=str(tmp_path / "prompts.txt")))

    def save(self, path, **more):
        Path(path).write_bytes(b"half")
        raise FULL

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(RunError, match="no space left on the disk of"):
        train(config)
    assert not list((tmp_path / "run").rglob("*.png"))


def test_no_room_for_the_final_model(pipeline, tiny_pairs, tmp_path, monkeypatch):
    config = tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=2)

    def save(self, net, target, *more):
        (target / "model_index.json").write_text("{}")
        raise SafetensorError("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(Network, "save", save)
        with pytest.raises(RunError, match="no space left on the disk of"):
            train(config)
    assert not (tmp_path / "run" / "final").exists()
    assert not list((tmp_path / "run").glob(".final*"))
    assert (train(config, resume=True) / "final" / "unet").is_dir()


def test_a_former_folder_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "final"
    for content in ("one", "two"):
        with made_beside(target) as folder:
            (folder / content).touch()
            assert not target.exists() or [path.name for path in target.iterdir()] == ["one"]
        assert [path.name for path in target.iterdir()] == [content]
    with pytest.raises(ValueError, match="no"), made_beside(target) as folder:
        (folder / "three").touch()
        raise ValueError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    target.rename(tmp_path / ".final.former")  # killed between the two renames
    with pytest.raises(ValueError, match="no"), made_beside(target) as folder:
        raise ValueError("no")
    assert [path.name for path in target.iterdir()] == ["two"]


def test_small_files_tell_a_full_disk_from_one_that_is_not_ours(tmp_path):
    with files_of_at_most(10), pytest.raises(RunError, match=r"cannot write .*x: no space left on the disk of"):
        write_whole(tmp_path / "x", b"0" * 100)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write "):
        write_whole(tmp_path / "file" / "x", b"0")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (FULL, True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), True),
        (SafetensorError("I/O error: File too large (os error 27)"), True),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), False),
        (ValueError("no"), False),
    ],
)
def test_what_counts_as_a_full_disk(error, full):
    assert disk_full(error) == full
