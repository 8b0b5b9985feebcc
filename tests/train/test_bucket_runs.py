"""Training at several shapes: what is trained on, in any split, cut and resumed, by each kind of points."""

import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.datasets import encoded, noise
from support.families import FAMILIES
from support.runs import assert_resumes_bit_for_bit, metrics, tiny_config, with_lora
from support.tiny import make_mixed, write_pairs

from diffpref.__main__ import main
from diffpref.data.loader import Loader
from diffpref.errors import UserError
from diffpref.objectives import DRO, KTO
from diffpref.points import Independent, Inverted, Replay
from diffpref.train.check import check
from diffpref.train.config_file import to_yaml
from diffpref.train.loop import train

SHAPES = {(4, 8, 8), (4, 6, 10), (4, 10, 6)}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """30 pairs: 12 squares, 12 wide and 6 tall ones."""
    return write_pairs(tmp_path_factory.mktemp("mixed") / "pairs", make_mixed(30))


@pytest.fixture
def config(pipeline, mixed, tmp_path):
    def build(name: str = "run", data: dict | None = None, **sizes):
        made = tiny_config(pipeline, mixed, tmp_path / name, **sizes)
        return replace(made, data=replace(made.data, buckets=True, bucket_step=8, **(data or {})))

    return build


@pytest.fixture
def shapes(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of all batches that are made from here on."""
    found, real = [], Loader.deliver

    def deliver(self, batch):
        found.append(tuple(batch.latents.shape[1:]))
        return real(self, batch)

    monkeypatch.setattr(Loader, "deliver", deliver)
    return found


def curve(run) -> list[float]:
    return [line["loss"] for line in metrics(run)]


@pytest.mark.parametrize("lora", [False, True])
def test_a_cut_run_goes_on_bit_for_bit(config, tmp_path, shapes, lora):
    made = config(max_steps=12, checkpointing_steps=4, data={"holdout": 0.2})
    assert_resumes_bit_for_bit(with_lora(made) if lora else made, tmp_path, cut=8)
    assert set(shapes) == SHAPES


def test_the_split_of_the_batch_changes_nothing(config):
    whole = curve(train(config("whole", batch_size=4, max_steps=15, checkpointing_steps=0)))
    parts = {"batch_size": 2, "gradient_accumulation_steps": 2}
    split = curve(train(config("split", max_steps=15, checkpointing_steps=0, **parts)))
    # batches of other sizes have other last bits, which the steps before enlarge; another sample would show at 1e-3
    assert split == pytest.approx(whole, abs=1e-4) and max(whole) - min(whole) > 1e-3


def test_two_processes_change_nothing(config, tmp_path):
    whole = curve(train(config("whole", batch_size=4, max_steps=12, checkpointing_steps=0)))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config("both", batch_size=2, max_steps=12, checkpointing_steps=0)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launch, "-m", "diffpref", "train", "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(tmp_path / "both") == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        {"objective": KTO(beta=100.0), "points": Independent()},
        {"points": Inverted(stride=500)},
        {"objective": DRO(), "points": Replay(sampler="ddim", steps=3)},
        {"objective": DRO(), "points": Replay(sampler="ddim", steps=3, offline_share=0.5)},
    ],
    ids=["kto", "inverted", "dro", "dro offline"],
)
def test_every_kind_of_points_takes_every_shape(config, shapes, kind):
    run = train(check(replace(config(max_steps=12, checkpointing_steps=0, data={"holdout": 0.2}), **kind)))
    assert set(shapes) == SHAPES and len(metrics(run)) == 12
    assert all(torch.isfinite(torch.tensor(curve(run))))


@pytest.mark.parametrize("data", [{"cache": "none", "crop": "random"}, {"latents": "moments", "shuffle": "block"}])
def test_uncached_crops_moments_and_blocks(config, shapes, data):
    run = train(check(config(max_steps=10, checkpointing_steps=0, data=data)))
    assert set(shapes) == SHAPES and len(curve(run)) == 10


@pytest.mark.parametrize("name", ["sdxl", "qwenimage"])
def test_other_families_train_at_every_shape(config, shapes, tmp_path, name):
    made = config(max_steps=8, checkpointing_steps=0, data={"cache": str(tmp_path / "store")})
    model = replace(made.model, pretrained=str(FAMILIES[name](tmp_path / "model")), lora_rank=2)
    run = train(check(replace(made, model=model)))
    assert set(shapes) == SHAPES
    assert curve(run)[0] == pytest.approx(0.6931471805599453, abs=1e-5)
    assert all(line["grad_norm"] > 0 for line in metrics(run))


def test_the_start_tells_how_many_have_which_shape(config, caplog):
    with caplog.at_level(logging.INFO, "diffpref"):
        train(config(max_steps=1, batch_size=4, gradient_accumulation_steps=2))
    assert "buckets: 32x32: 12, 40x24: 12, 24x40: 6" in [record.message for record in caplog.records]
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "buckets of fewer items than a step's 8, whose steps take an item several times: 24x40: 6"


def test_squares_tell_nothing_of_buckets(config, caplog):
    made = config(max_steps=1)
    with caplog.at_level(logging.INFO, "diffpref"):
        train(replace(made, data=replace(made.data, buckets=False)))
    assert not any("bucket" in record.message for record in caplog.records)


def test_training_after_data_cache_encodes_nothing(config, pipeline, mixed, tmp_path, monkeypatch, capsys):
    made = config(max_steps=6, checkpointing_steps=0, data={"cache": str(tmp_path / "store")})
    command = ["data", "cache", str(mixed), "--model", str(pipeline), "--resolution", "32", "--flip"]
    command += ["--buckets", "--bucket-step", "8", "--cache", str(tmp_path / "store")]
    assert main(command) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("120 latents and") and told[1] == "buckets: 32x32: 12, 40x24: 12, 24x40: 6"
    from diffpref.models.sd import StableDiffusion

    monkeypatch.setattr(StableDiffusion, "encode_images", lambda *_: pytest.fail("an image was encoded"))
    assert len(curve(train(made))) == 6


class TestRefused:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"bucket_step": 0}, "data.bucket_step: 0 is not above 0"),
            ({"bucket_step": 7}, "data.bucket_step: the resolution of 32 is no multiple of 7"),
            ({"bucket_max_aspect": 0.9}, "data.bucket_max_aspect: 0.9 is not a finite number from 1 on"),
        ],
    )
    def test_keys_before_anything_is_loaded(self, config, keys, message):
        made = config()
        with pytest.raises(UserError) as caught:
            check(replace(made, data=replace(made.data, **keys)))
        assert str(caught.value) == message

    @pytest.mark.parametrize("points", [{"trajectories": 2}, {"refresh_steps": 2}])
    def test_kept_trajectories(self, config, points):
        kind = {"objective": DRO(), "points": Replay(sampler="ddim", steps=3, **points)}
        with pytest.raises(UserError, match=r"^data.buckets: replay points that keep trajectories"):
            check(replace(config(), **kind))
        made = replace(config(), **kind)
        assert check(replace(made, data=replace(made.data, buckets=False)))

    def test_from_the_command_line(self, config, mixed, pipeline, tmp_path, capsys):
        command = ["train", "sd15-dpo", "--data.path", str(mixed), "--model.pretrained", str(pipeline)]
        command += ["--data.resolution", "32", "--output-dir", str(tmp_path / "run"), "--data.buckets", "true"]
        command += ["--train.mixed-precision", "no"]
        for step, told in (("3", "the resolution of 32 is no multiple of 3"), ("2", "2 is no multiple of the VAE's 4")):
            assert main([*command, "--data.bucket-step", step]) == 2
            assert f"data.bucket_step: {told}" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_an_image_too_long_for_any_bucket_is_cut(config, tmp_path):
    rows = [
        replace(row, chosen=encoded(noise(n, 300, 10)), rejected=row.rejected) for n, row in enumerate(make_mixed(4))
    ]
    made = config(max_steps=2, checkpointing_steps=0)
    pairs = write_pairs(tmp_path / "long", rows)
    run = train(replace(made, data=replace(made.data, path=str(pairs), cache=str(tmp_path / "long.cache"))))
    assert len(curve(run)) == 2
