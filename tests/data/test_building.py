"""Several builders of one store, killed ones, and what a start no longer has to read."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.datasets import encoded, noise, truncated_jpeg
from support.tiny import SIDE, load, make_pairs, write_pairs

from diffpref.data.building import Claims, clean, image_hashes, share
from diffpref.data.dataset import Pictures, PreferenceDataset
from diffpref.data.store import build_store
from diffpref.data.views import View
from diffpref.train.config import DataConfig

DATA = DataConfig(resolution=SIDE)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def backbone(pipeline):
    return load(pipeline)


def read_images(monkeypatch) -> list[int]:
    """The rows whose images are read from here on."""
    rows, real = [], Pictures.group_images

    def group_images(self, group, wanted=None):
        for row, side, content in real(self, group, wanted):
            rows.append(row)
            yield row, side, content

    monkeypatch.setattr(Pictures, "group_images", group_images)
    return rows


def everything(store) -> torch.Tensor:
    """The latents of all images that can be read."""
    return store.read([View(int(row), int(side)) for row, side in np.argwhere(store.places[..., 0] >= 0)])[0]


def test_a_second_start_reads_no_image(tmp_path, backbone, monkeypatch):
    chosen = [truncated_jpeg() if n == 5 else encoded(noise(100 + n, SIDE, SIDE)) for n in range(30)]
    path = write_pairs(tmp_path / "data", make_pairs(30, chosen=chosen))
    first = build_store(tmp_path / "store", PreferenceDataset.open(path), backbone, DATA)
    rows = read_images(monkeypatch)
    moved = path.rename(tmp_path / "elsewhere")
    again = build_store(tmp_path / "store", PreferenceDataset.open(moved), backbone, DATA)
    assert rows == [] and again.bad == first.bad and list(again.bad) == [5]
    assert np.array_equal(again.places, first.places)


def test_of_a_changed_file_the_images_are_summed_again(tmp_path, backbone, monkeypatch):
    path = write_pairs(tmp_path / "data", make_pairs(4))
    build_store(tmp_path / "store", PreferenceDataset.open(path), backbone, DATA)
    (file,) = path.glob("*.parquet")
    os.utime(file, ns=(0, 10**9))
    rows = read_images(monkeypatch)
    build_store(tmp_path / "store", PreferenceDataset.open(path), backbone, DATA)
    assert sorted(set(rows)) == [0, 1, 2, 3]


def test_an_index_that_is_wrong_heals(tmp_path, backbone):
    dataset = PreferenceDataset.open(write_pairs(tmp_path / "data", make_pairs(4)))
    first = build_store(tmp_path / "store", dataset, backbone, DATA)
    (index,) = (tmp_path / "store").glob("images-*.sha256")
    content = bytearray(index.read_bytes())
    content[40] ^= 4
    index.write_bytes(content[:-70])
    again = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert np.array_equal(again.hashes, first.hashes) and torch.equal(everything(again), everything(first))


def test_rows_left_out_at_first_are_read_when_they_are_wanted(tmp_path, backbone, monkeypatch):
    dataset = PreferenceDataset.open(write_pairs(tmp_path / "data", make_pairs(20)))
    build_store(tmp_path / "store", replace(dataset, left_out={3: "x", 12: "x"}), backbone, DATA)
    rows = read_images(monkeypatch)
    store = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert sorted(set(rows)) == [3, 12] and (store.places >= 0).all()


def test_a_row_does_not_depend_on_what_else_is_encoded(tmp_path, backbone):
    """Bit for bit: in parts, in other company, and at once."""
    dataset = PreferenceDataset.open(write_pairs(tmp_path / "data", make_pairs(20)))
    whole = build_store(tmp_path / "whole", dataset, backbone, DATA)
    for start in (5, 0):
        part = replace(dataset, left_out=dict.fromkeys([*range(start), *range(start + 3, 20, 2)], "x"))
        build_store(tmp_path / "parts", part, backbone, DATA)
    parts = build_store(tmp_path / "parts", dataset, backbone, DATA)
    assert torch.equal(everything(parts), everything(whole))
    assert torch.equal(parts.prompts(dataset.prompts)["text"], whole.prompts(dataset.prompts)["text"])


def test_old_leftovers_go_and_young_ones_stay(tmp_path):
    for name in ("a.part", "b.part", "c.safetensors", "d.safetensors", "d.json", "e.safetensors"):
        (tmp_path / name).touch()
    for name in ("a.part", "c.safetensors", "d.safetensors", "d.json"):
        os.utime(tmp_path / name, (1, 1))
    clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.part", "d.json", "d.safetensors", "e.safetensors"]


def test_a_claim_ends_with_its_process(tmp_path):
    program = f"""
        import pathlib, sys, time
        from diffpref.data.building import Claims
        print(Claims(pathlib.Path({str(tmp_path)!r})).take("unit"), flush=True)
        time.sleep(60)
    """
    with started(program) as other:
        assert other.stdout.readline() == "True\n"
        claims = Claims(tmp_path)
        assert not claims.take("unit") and claims.take("another unit")
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert claims.take("unit", wait=True)
        claims.release()


def test_what_another_has_is_waited_for_and_then_looked_at(tmp_path):
    class Held(Claims):
        """Unit b is another's until it is waited for."""

        free = False

        def take(self, unit: str, wait: bool = False) -> bool:
            self.free = self.free or wait
            return unit != "b" or self.free

    done: list[str] = []
    units = ["a", "b", "c"]
    share(units, Held(tmp_path), lambda n: done.append(units[n]), lambda: False, lambda: done.append("saved"))
    assert done == ["a", "c", "saved", "b", "saved"]


def started(program: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def builder(store: Path, data: Path, pipeline: Path) -> str:
    """A program that fills a store slowly, in many shards, and tells how many images it encoded."""
    return f"""
        import pathlib, time, torch
        from diffpref.data import shards, store
        from diffpref.data.dataset import PreferenceDataset
        from diffpref.models import sd
        from diffpref.train.config import DataConfig, ModelConfig
        shards.SHARD_BYTES = 1
        encode, made = sd.StableDiffusion.encode_images, []
        def encode_images(self, pixels):
            made.append(len({{row.numpy().tobytes() for row in pixels}}))
            time.sleep(0.05)
            return encode(self, pixels)
        sd.StableDiffusion.encode_images = encode_images
        torch.set_num_threads(1)
        backbone = sd.load(ModelConfig({str(pipeline)!r}), torch.device("cpu"), torch.float32, False)
        dataset = PreferenceDataset.open(pathlib.Path({str(data)!r}))
        print("ready", flush=True)
        store.build_store(pathlib.Path({str(store)!r}), dataset, backbone, DataConfig(resolution={SIDE}))
        print(sum(made), flush=True)
    """


def test_two_builders_share_the_work(tmp_path, pipeline, backbone):
    data = write_pairs(tmp_path / "data", make_pairs(160))
    program = builder(tmp_path / "store", data, pipeline)
    with started(program) as one, started(program) as two:
        made = [int(other.communicate()[0].split()[1]) for other in (one, two)]
    assert sum(made) == 320 and min(made) > 0
    dataset = PreferenceDataset.open(data)
    together = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert torch.equal(everything(together), everything(build_store(tmp_path / "alone", dataset, backbone, DATA)))


def kill_and_go_on(tmp_path: Path, pipeline: Path, backbone, kills: int) -> None:
    data, random = write_pairs(tmp_path / "data", make_pairs(160)), np.random.default_rng(kills)
    for _ in range(kills):
        with started(builder(tmp_path / "store", data, pipeline)) as other:
            other.stdout.readline()
            time.sleep(float(random.uniform(0, 0.5)))
            other.send_signal(signal.SIGKILL)
    dataset = PreferenceDataset.open(data)
    found = build_store(tmp_path / "store", dataset, backbone, DATA)
    whole = build_store(tmp_path / "whole", dataset, backbone, DATA)
    assert torch.equal(everything(found), everything(whole)) and np.array_equal(found.hashes, whole.hashes)
    assert torch.equal(found.prompts(dataset.prompts)["text"], whole.prompts(dataset.prompts)["text"])


def test_killed_builders_change_nothing(tmp_path, pipeline, backbone):
    kill_and_go_on(tmp_path, pipeline, backbone, 2)


@pytest.mark.slow
def test_twenty_killed_builders_change_nothing(tmp_path, pipeline, backbone):
    kill_and_go_on(tmp_path, pipeline, backbone, 20)


def test_hashes_of_several_files_are_kept_apart(tmp_path):
    folder = write_pairs(tmp_path / "data", make_pairs(4))
    (file,) = folder.glob("*.parquet")
    (folder / "train-00001.parquet").write_bytes(file.read_bytes())
    (folder / "dataset.json").unlink()
    dataset = PreferenceDataset.open(folder)
    known = image_hashes(tmp_path, dataset)
    known.rows[2:6] = np.arange(1, 5)[:, None, None]
    known.note(range(2, 6))
    assert image_hashes(tmp_path, dataset).rows[:, 0, 0].tolist() == [0, 0, 1, 2, 3, 4, 0, 0]
