"""`diffpref data cache`: what it builds is what `train` reads."""

from dataclasses import replace

import pytest
from support.families import FAMILIES
from support.runs import metrics, tiny_config
from support.tiny import SIDE, make_pairs, write_pairs

from diffpref.__main__ import main
from diffpref.models.sd import StableDiffusion
from diffpref.models.sd3 import StableDiffusion3
from diffpref.train.loop import train


def refuse(self, given):
    pytest.fail("something was encoded")


@pytest.mark.parametrize("latents", ["mean", "moments"])
def test_training_after_it_encodes_nothing(pipeline, tmp_path, monkeypatch, capsys, latents):
    data = write_pairs(tmp_path / "data", make_pairs(6))
    command = ["data", "cache", str(data), "--model", str(pipeline), "--resolution", str(SIDE), "--flip"]
    assert main([*command, "--latents", latents]) == 0
    told = capsys.readouterr().out
    shards = sum(file.stat().st_size for file in (tmp_path / "data.cache").glob("*.safetensors"))
    assert told == f"24 latents and 4 prompts in {data}.cache, {shards:,} bytes\n"
    for name in ("encode_images", "encode_moments", "encode_prompts"):
        monkeypatch.setattr(StableDiffusion, name, refuse)
    config = tiny_config(pipeline, data, tmp_path / "run", max_steps=2)
    run = train(replace(config, data=replace(config.data, latents=latents)))
    assert all(0 <= line["data_wait"] <= 1 for line in metrics(run))


def test_another_text_length_is_another_recipe(tmp_path, capsys, monkeypatch):
    model = FAMILIES["sd3"](tmp_path / "model")
    data = write_pairs(tmp_path / "data", make_pairs(4))
    command = ["data", "cache", str(data), "--model", str(model), "--resolution", str(SIDE), "--max-text-length"]
    for length in ("7", "9"):
        assert main([*command, length]) == 0
    monkeypatch.setattr(StableDiffusion3, "encode_prompts", refuse)
    assert main([*command, "7"]) == 0
    assert len({file.name.split("-")[1] for file in (tmp_path / "data.cache").glob("text_text-*.json")}) == 2


def test_verify_finds_what_keeps_its_time(pipeline, tmp_path, capsys, caplog):
    import os

    data = write_pairs(tmp_path / "data", make_pairs(6))
    command = ["data", "cache", str(data), "--model", str(pipeline), "--resolution", str(SIDE)]
    assert main(command) == 0
    (shard,) = (tmp_path / "data.cache").glob("latents-*.safetensors")
    content, seen = bytearray(shard.read_bytes()), shard.stat()
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert main(command) == 0 and "damaged" not in caplog.text
    assert main([*command, "--verify"]) == 0
    assert f"{shard} is damaged; what it lacks is made again" in caplog.text
    assert len(list((tmp_path / "data.cache").glob("latents-*.safetensors"))) == 2
