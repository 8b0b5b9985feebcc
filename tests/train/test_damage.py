"""A thousand bit flips and truncations of a checkpoint's files: none is loaded, and the newest whole one is taken."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from diffpref.train.checkpoint import capture, newest, save
from diffpref.train.kept import Kept, newest_whole

FLIPS, CUTS = 800, 200


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 5 and 10."""
    for step in (5, 10):
        torch.manual_seed(step)
        net = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        extra = {"ema": dict(net.named_parameters()), "points": {"count": torch.ones(2, dtype=torch.int64)}}
        state = {"non_finite": 0, "guard": {"count": 0, "good": None}}
        save(tmp_path, capture(step, net, optimizer, state, extra), keep=0)
    return tmp_path


def test_every_flip_and_every_cut_is_seen(two):
    files = sorted((two / "step-10").iterdir())
    assert len(files) == 6
    draw = random.Random(0)
    hit = dict.fromkeys((file.name for file in files), 0)
    for number in range(FLIPS + CUTS):
        file = draw.choice(files)
        whole = file.read_bytes()
        broken = bytearray(whole)
        if number < FLIPS:
            broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        else:
            del broken[draw.randrange(len(whole)) :]
        file.write_bytes(broken)
        found, damaged = newest_whole(two)
        assert found is not None and found.step == 5 and [each.step for each in damaged] == [10], file.name
        hit[file.name] += 1
        file.write_bytes(whole)
    assert sum(hit.values()) == 1000 and min(hit.values()) > 100
    assert newest(two)[0].step == 10  # with every byte back in its place it is whole again


def test_a_flip_in_every_byte_of_a_manifest_is_seen(two):
    manifest = two / "step-10" / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        manifest.write_bytes(broken)
        assert Kept(10, two / "step-10").damage


def test_what_is_wrong_is_told(two):
    folder = two / "step-10"
    weights = folder / "weights.safetensors"
    whole = weights.read_bytes()

    def damage() -> str | None:
        return Kept(10, folder).damage

    weights.write_bytes(whole[:-3])
    assert damage() == f"weights.safetensors has {len(whole) - 3} bytes instead of {len(whole)}"
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert damage() == "weights.safetensors does not match its sum"
    weights.unlink()
    assert damage() == "weights.safetensors is missing"
    weights.write_bytes(whole)
    (folder / ".DS_Store").write_text("whatever a system leaves there")
    assert damage() is None
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert damage() == "manifest.json does not match its own sum"
    (folder / "manifest.json").unlink()
    assert damage() == "manifest.json: No such file or directory"


def test_a_file_that_the_manifest_does_not_name_is_not_loaded(two):
    shutil.copy(two / "step-5" / "ema.safetensors", two / "step-10" / "strange.safetensors")
    assert set(newest(two)[0].extra) == {"ema", "points"}


def test_a_checkpoint_under_another_name_is_damaged(two):
    (two / "step-10").rename(two / "step-20")
    found, damaged = newest(two)
    assert found.step == 5 and damaged == [two / "step-20"]
    assert Kept(20, two / "step-20").damage == "it is the checkpoint of step 10"


def test_other_names_are_no_checkpoints(two):
    for name in ("step-", "step-7x", "step-010", ".step-9-0a.part"):
        shutil.copytree(two / "step-10", two / name)
    (two / "step-30").touch()
    assert newest(two)[0].step == 10 and newest(two)[1] == []


def test_no_manifest_no_checkpoint(tmp_path: Path):
    assert newest_whole(tmp_path / "missing") == (None, [])
