"""The store: latents are what the VAE says, each made once, and bad images are named and passed over."""

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.datasets import encoded, make_images, noise, truncated_jpeg, write_rows
from support.tiny import SIDE, load, make_pairs, write_pairs

from diffpref.data.choice import choose_rows
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import decode
from diffpref.data.pixels import to_pixels
from diffpref.data.store import build_store
from diffpref.data.views import View
from diffpref.errors import RunError, UserError
from diffpref.files import sha256
from diffpref.models.sd import StableDiffusion
from diffpref.train.config import DataConfig

DATA = DataConfig(resolution=SIDE)


@pytest.fixture
def backbone(pipeline):
    return load(pipeline)


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How many images and prompts are encoded from here on."""
    counted = {"images": 0, "prompts": 0}
    images, prompts = StableDiffusion.encode_images, StableDiffusion.encode_prompts

    def encode_images(self, pixels):
        counted["images"] += len({row.numpy().tobytes() for row in pixels})  # full batches hold repeats
        return images(self, pixels)

    def encode_prompts(self, texts):
        counted["prompts"] += len(set(texts))
        return prompts(self, texts)

    monkeypatch.setattr(StableDiffusion, "encode_images", encode_images)
    monkeypatch.setattr(StableDiffusion, "encode_prompts", encode_prompts)
    return counted


def pairs(folder, count: int = 10, **columns) -> PreferenceDataset:
    return PreferenceDataset.open(write_pairs(folder, make_pairs(count, **columns)))


def close_to_fp16(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.half().float(), atol=2e-3, rtol=2e-3)


def test_latents_and_text_are_those_of_direct_encoding(tmp_path, backbone):
    dataset = pairs(tmp_path / "data", 10)
    store = build_store(tmp_path / "store", dataset, backbone, DATA)
    for row in (0, 9):
        for place, side in enumerate(("chosen", "rejected")):
            pixels = to_pixels(decode(dataset.image_bytes(row, side)), (SIDE, SIDE), "center")[None]
            found = store.read([View(row, place, False)])[0]
            assert found.dtype == torch.float32
            close_to_fp16(found, backbone.encode_images(pixels))
    prompts = [dataset.prompts[7], "", dataset.prompts[0]]
    close_to_fp16(store.prompts(prompts)["text"], backbone.encode_prompts(prompts)["text"])
    assert store.bad == {} and (store.places >= 0).all()


def test_hashes_are_of_the_original_bytes(tmp_path, backbone):
    dataset = pairs(tmp_path / "data", 2)
    store = build_store(tmp_path / "store", dataset, backbone, DATA)
    (tmp_path / "image").write_bytes(dataset.image_bytes(1, "rejected"))
    assert store.hashes[1][1].tobytes().hex() == sha256(tmp_path / "image")


def test_repeats_are_stored_once(tmp_path, backbone, calls):
    same = encoded(noise(999, SIDE, SIDE))
    dataset = pairs(tmp_path / "data", 20, chosen=[same] * 20, prompt=["one"] * 20)
    store = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert len(store.latents[0]) == 21  # the chosen one, and 20 rejected ones
    assert calls == {"images": 21, "prompts": 2}  # "one" and the empty prompt
    assert len({chosen.tobytes() for chosen, _ in store.hashes}) == 1


def test_the_second_build_encodes_nothing_and_loads_no_encoder(tmp_path, pipeline, backbone, calls):
    dataset = pairs(tmp_path / "data", 10)
    first = build_store(tmp_path / "store", dataset, backbone, DATA)
    files = sorted(path.name for path in (tmp_path / "store").iterdir())
    assert calls == {"images": 20, "prompts": 6}
    again = load(pipeline)
    second = build_store(tmp_path / "store", dataset, again, DATA)
    assert calls == {"images": 20, "prompts": 6}
    assert not {"model", "encoder", "tokenizer"} & {*vars(again.vae), *vars(again.text)}
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == files
    assert np.array_equal(second.hashes, first.hashes)
    assert torch.equal(first.read([View(3, 0, False)])[0], second.read([View(3, 0, False)])[0])


def test_only_what_is_new_is_made(tmp_path, backbone, calls):
    build_store(tmp_path / "store", pairs(tmp_path / "few", 4), backbone, DATA)
    build_store(tmp_path / "store", pairs(tmp_path / "more", 6), backbone, DATA)
    assert calls == {"images": 12, "prompts": 1 + 3}


def test_a_damaged_shard_is_made_again(tmp_path, backbone, calls):
    dataset = pairs(tmp_path / "data", 3)
    first = build_store(tmp_path / "store", dataset, backbone, DATA)
    views = [View(row, side) for row in range(3) for side in range(2)]
    expected = first.read(views)[0]
    (shard,) = (tmp_path / "store").glob("latents-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[content.index(expected[2].half().numpy().tobytes())] ^= 0x40
    (tmp_path / "other").write_bytes(content)
    (tmp_path / "other").replace(shard)
    store = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert calls["images"] == 6 + 1 and store.latents[0].damaged == [shard]
    assert torch.equal(store.read(views)[0], expected)


@pytest.mark.parametrize("change", [{"resolution": 16}, {"crop": "none"}])
def test_another_resolution_or_crop_is_another_recipe(tmp_path, backbone, calls, change):
    dataset = pairs(tmp_path / "data", 2)
    first = build_store(tmp_path / "store", dataset, backbone, DATA)
    second = build_store(tmp_path / "store", dataset, backbone, replace(DATA, **change))
    assert calls == {"images": 8, "prompts": 2}  # the text is shared
    assert np.array_equal(first.hashes, second.hashes)
    side = change.get("resolution", SIDE) // 4
    assert second.read([View(0, 0, False)])[0].shape == (1, 4, side, side)
    assert first.read([View(0, 0, False)])[0].shape == (1, 4, 8, 8)


def test_another_vae_is_another_recipe(tmp_path, pipeline, v_pipeline, calls):
    dataset = pairs(tmp_path / "data", 2)
    first = build_store(tmp_path / "store", dataset, load(pipeline), DATA)
    second = build_store(tmp_path / "store", dataset, load(pipeline, vae=str(v_pipeline)), DATA)
    assert calls == {"images": 8, "prompts": 2}
    assert not torch.equal(first.read([View(0, 0, False)])[0], second.read([View(0, 0, False)])[0])


def test_the_networks_precision_is_the_same_recipe(tmp_path, pipeline, calls):
    dataset = pairs(tmp_path / "data", 2)
    build_store(tmp_path / "store", dataset, load(pipeline), DATA)
    build_store(tmp_path / "store", dataset, load(pipeline, weights=torch.bfloat16), DATA)
    assert calls == {"images": 4, "prompts": 2}


def test_flips_are_stored_beside(tmp_path, backbone, calls):
    dataset = pairs(tmp_path / "data", 2)
    build_store(tmp_path / "store", dataset, backbone, DATA)
    store = build_store(tmp_path / "store", dataset, backbone, replace(DATA, flip=True))
    assert calls["images"] == 4 + 4
    pixels = to_pixels(decode(dataset.image_bytes(1, "chosen")), (SIDE, SIDE), "center")[None]
    close_to_fp16(store.read([View(1, 0, True)])[0], backbone.encode_images(pixels.flip(3)))
    close_to_fp16(store.read([View(1, 0, False)])[0], backbone.encode_images(pixels))
    assert not torch.equal(store.read([View(1, 0, True)])[0], store.read([View(1, 0, False)])[0])


def test_captions_of_both_images_are_stored(tmp_path, backbone):
    captions = {"chosen_prompt": ["the left one", None], "rejected_prompt": [None, "the right one"]}
    store = build_store(tmp_path / "store", pairs(tmp_path / "data", 2, **captions), backbone, DATA)
    given = ["the left one", "the right one", "a red circle number 0"]
    close_to_fp16(store.prompts(given)["text"], backbone.encode_prompts(given)["text"])


def test_a_bad_image_is_named_and_its_row_left_out(tmp_path, backbone):
    bad = [encoded(noise(n, SIDE, SIDE)) for n in range(40)]
    bad[3] = truncated_jpeg()
    dataset = pairs(tmp_path / "data", 40, rejected=bad, label=[1.0] * 40)
    store = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert list(store.bad) == [3] and "truncated" in store.bad[3].lower()
    assert np.argwhere(store.places[..., 0] < 0).tolist() == [[3, 1]]
    choice = choose_rows(dataset, store.bad, DATA)
    assert choice.dropped == {"unreadable": 1, "ties": 0} and len(choice.train) == 39
    again = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert again.bad == store.bad


def test_every_row_with_a_bad_image_counts(tmp_path, backbone):
    images = [encoded(noise(n, SIDE, SIDE)) for n in range(40)]
    images[2] = images[30] = truncated_jpeg()  # in different batches
    store = build_store(tmp_path / "store", pairs(tmp_path / "data", 40, chosen=images), backbone, DATA)
    assert sorted(store.bad) == [2, 30]


def test_more_than_five_in_a_hundred_stop(tmp_path, backbone):
    images = [encoded(noise(n, SIDE, SIDE)) for n in range(40)]
    images[4], images[5], images[6] = b"", b"no image", encoded(noise(0, 1, 200))
    dataset = pairs(tmp_path / "data", 40, chosen=images)
    with pytest.raises(UserError) as error:
        build_store(tmp_path / "store", dataset, backbone, DATA)
    assert str(error.value) == (
        "3 of 40 rows have images that cannot be read (over 5%); the first is row pair-4: no bytes"
    )


def test_a_latent_that_is_not_finite_stops(tmp_path, backbone):
    with torch.no_grad():
        next(iter(backbone.vae.model.parameters())).fill_(float("nan"))
    with pytest.raises(RunError, match="not finite in fp16"):
        build_store(tmp_path / "store", pairs(tmp_path / "data", 2), backbone, DATA)
    assert not list((tmp_path / "store").glob("latents*"))


def test_a_resolution_that_the_vae_cannot_take_writes_nothing(tmp_path, backbone):
    with pytest.raises(UserError, match="resolution: 30"):
        build_store(tmp_path / "store", pairs(tmp_path / "data", 2), backbone, replace(DATA, resolution=30))
    assert not (tmp_path / "store").exists()


def test_no_permission_to_write_is_one_line(tmp_path, backbone, monkeypatch):
    dataset = pairs(tmp_path / "data", 2)
    (tmp_path / "file").touch()
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "store", "Not a directory")):
        with pytest.raises(UserError, match=rf"^data\.cache: cannot write {folder}: {reason}$"):
            build_store(folder, dataset, backbone, DATA)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    with pytest.raises(UserError, match=r"^data\.cache: cannot write .*store: Permission denied$"):
        build_store(tmp_path / "store", dataset, backbone, DATA)


def test_a_finished_store_needs_no_permission(tmp_path, backbone, monkeypatch):
    dataset = pairs(tmp_path / "data", 2)
    first = build_store(tmp_path / "store", dataset, backbone, DATA)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    again = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert np.array_equal(again.places, first.places)


def test_the_store_keeps_fp16_on_disk(tmp_path, backbone):
    store = build_store(tmp_path / "store", pairs(tmp_path / "data", 2), backbone, DATA)
    (shard,) = (tmp_path / "store").glob("latents*.safetensors")
    kept = load_file(shard)
    assert kept["rows"].dtype == np.float16
    (place,) = np.flatnonzero((kept["keys"] == store.hashes[0, 0]).all(axis=1))
    read = store.latents[0].rows(store.hashes[0, :1]).numpy()
    assert read.dtype == np.float32
    assert np.array_equal(read[0], kept["rows"][place].astype(np.float32))


@pytest.mark.parametrize("full_from", [1, 2])  # the first shard, of latents; or one of text, when those are there
def test_a_full_disk_is_one_line_and_a_rerun_goes_on(tmp_path, backbone, monkeypatch, full_from):
    dataset, written, write = pairs(tmp_path / "data", 3), [], Path.write_bytes

    def full(path, content):
        written.append(path)
        if len(written) >= full_from:
            write(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"^data\.cache: cannot write .*store: No space left on device$"):
            build_store(tmp_path / "store", dataset, backbone, DATA)
    assert not list((tmp_path / "store").glob("*.part"))
    before = {file: file.read_bytes() for file in (tmp_path / "store").glob("*.safetensors")}
    assert len(before) == full_from - 1
    again = build_store(tmp_path / "store", dataset, backbone, DATA)
    whole = build_store(tmp_path / "whole", dataset, backbone, DATA)
    views = [View(row, side) for row in range(3) for side in (0, 1)]
    assert torch.equal(again.read(views)[0], whole.read(views)[0])
    assert all(file.read_bytes() == content for file, content in before.items())


def test_single_images_have_one_hash_each(tmp_path, backbone, calls):
    dataset = PreferenceDataset.open(write_rows(tmp_path / "data", make_images(5)))
    store = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert calls == {"images": 5, "prompts": 4}
    pixels = to_pixels(decode(dataset.image_bytes(3, "image")), (SIDE, SIDE), "center")[None]
    close_to_fp16(store.read([View(3, 0, False)])[0], backbone.encode_images(pixels))
    assert all(len(shas) == 1 for shas in store.hashes)


def test_rows_that_the_options_leave_out_are_not_encoded(tmp_path, backbone, calls):
    broken = [truncated_jpeg() if n == 1 else encoded(noise(100 + n, SIDE, SIDE)) for n in range(10)]
    dataset = pairs(tmp_path / "data", 10, chosen=broken)
    left_out = replace(dataset, left_out=dict.fromkeys((0, 1, 2, 3), "of other generators"))
    store = build_store(tmp_path / "store", left_out, backbone, DATA)
    assert calls == {"images": 12, "prompts": 1 + 3}
    assert np.unique(np.nonzero(store.places < 0)[0]).tolist() == [0, 1, 2, 3] and store.bad == {}


def test_conditioning_of_several_parts_keeps_shapes_and_kinds(tmp_path, backbone, monkeypatch):
    width = 5
    monkeypatch.setattr(type(backbone), "cond_names", ("text", "pooled", "mask", "length"))

    def encode_prompts(self, prompts):
        sizes = torch.tensor([len(prompt) for prompt in prompts])
        text = sizes[:, None, None] * torch.ones(len(prompts), 3, width)
        return {"text": text, "pooled": text[:, 0], "mask": sizes[:, None] > torch.arange(4), "length": sizes}

    monkeypatch.setattr(type(backbone), "encode_prompts", encode_prompts)
    dataset = pairs(tmp_path / "data", 4, prompt=["a", "bb", "ccccc", "d" * 3000])
    for _ in range(2):  # made, then read again
        found = build_store(tmp_path / "store", dataset, backbone, DATA).prompts(["bb", "", "d" * 3000])
        assert found["text"].shape == (3, 3, width) and found["text"].dtype == torch.float32
        assert found["pooled"].tolist() == [[2.0] * width, [0.0] * width, [3000.0] * width]
        assert found["mask"].tolist() == [[True, True, False, False], [False] * 4, [True] * 4]
        assert found["length"].tolist() == [2, 0, 3000] and found["length"].dtype == torch.int64
