"""A store of several buckets: each image under its row's shape, built in any company, damaged, flipped, uncached."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.datasets import encoded, make_images, noise, truncated_jpeg, write_rows
from support.families import FAMILIES
from support.tiny import MIXED, SIDE, load, make_direct, make_mixed, make_pairs, write_pairs

from diffpref.data.dataset import Pictures, PreferenceDataset
from diffpref.data.direct import Direct
from diffpref.data.images import decode
from diffpref.data.loader import Loader
from diffpref.data.measuring import assign_buckets, refuse_sizes
from diffpref.data.pixels import to_pixels
from diffpref.data.store import Store, build_store
from diffpref.data.views import View, sampled
from diffpref.errors import RunError, UserError
from diffpref.models.loading import load_backbone
from diffpref.models.sd import StableDiffusion
from diffpref.train.config import DataConfig, ModelConfig

DATA = DataConfig(resolution=SIDE, buckets=True, bucket_step=8)  # (32, 32), (40, 24), (24, 40)
ROOT = Path(__file__).parents[2]
BUCKETS = [0, 1, 2, 0, 1]  # of MIXED's sizes


@pytest.fixture(scope="module")
def backbone(pipeline) -> StableDiffusion:
    return load(pipeline)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PreferenceDataset:
    return PreferenceDataset.open(write_pairs(tmp_path_factory.mktemp("mixed") / "data", make_mixed(25)))


def every(store: Store) -> dict[tuple[int, int], torch.Tensor]:
    """The latents of all images that can be read, by row and side."""
    found = np.argwhere(store.places[..., 0] >= 0).tolist()
    return {(row, side): store.read([View(row, side)])[0][0] for row, side in found}


def same(one: Store, other: Store) -> bool:
    a, b = every(one), every(other)
    return a.keys() == b.keys() and all(torch.equal(a[at], b[at]) for at in a)


def expected(dataset: PreferenceDataset, backbone, row: int, side: int, mirrored: bool = False) -> torch.Tensor:
    """Encoded on its own at a shape that is told by hand."""
    width, height = ((32, 32), (40, 24), (24, 40))[BUCKETS[row % 5]]
    pixels = to_pixels(decode(dataset.image_bytes(row, dataset.sides[side])), (width, height), "center")
    assert pixels.shape == (3, height, width)
    return backbone.encode_images((pixels.flip(-1) if mirrored else pixels)[None])[0]


@pytest.mark.parametrize("mirrored", [False, True])
def test_latents_are_those_of_direct_encoding_at_the_rows_shape(tmp_path, dataset, backbone, mirrored):
    store = build_store(tmp_path / "store", dataset, backbone, replace(DATA, flip=True))
    assert store.buckets.of_row.tolist() == BUCKETS * 5 and (store.places >= 0).all()
    assert [len(shards) for shards in store.latents] == [40, 40, 20]  # two rows, two sides, five times, two ways
    for row in range(10):
        for side in range(2):
            (found,), unreadable = store.read([View(row, side, mirrored)])
            direct = expected(dataset, backbone, row, side, mirrored)
            assert unreadable == set()
            torch.testing.assert_close(found, direct.half().float(), atol=2e-3, rtol=2e-3)


def test_moments_of_rectangles(tmp_path, dataset, backbone):
    store = build_store(tmp_path / "store", dataset, backbone, replace(DATA, latents="moments"))
    assert [shards.shape for shards in store.latents] == [(8, 8, 8), (8, 6, 10), (8, 10, 6)]
    views = [View(1, 0, seed=5), View(6, 1, seed=6)]
    for view, found in zip(views, store.read(views)[0], strict=True):
        content = decode(dataset.image_bytes(view.row, dataset.sides[view.side]))
        moments = backbone.encode_moments(to_pixels(content, (40, 24), "center")[None])
        torch.testing.assert_close(found, sampled(moments.half().float(), [view])[0], atol=1e-2, rtol=1e-2)


def test_views_of_several_buckets_are_refused(tmp_path, dataset, backbone):
    store = build_store(tmp_path / "store", dataset, backbone, DATA)
    with pytest.raises(ValueError, match="of 2 buckets"):
        store.read([View(0, 0), View(1, 0)])


def test_a_second_start_reads_and_encodes_nothing(tmp_path, dataset, backbone, monkeypatch):
    first = build_store(tmp_path / "store", dataset, backbone, DATA)
    monkeypatch.setattr(Pictures, "group_images", lambda *_: pytest.fail("an image was read"))
    monkeypatch.setattr(StableDiffusion, "encode_images", lambda *_: pytest.fail("an image was encoded"))
    assert same(build_store(tmp_path / "store", dataset, backbone, DATA), first)


def test_the_square_serves_runs_with_buckets_and_without(tmp_path, dataset, backbone, monkeypatch):
    """And rectangles of one table serve another table that has them."""
    encode, made = StableDiffusion.encode_images, []

    def encode_images(self, pixels):
        made.extend([tuple(pixels.shape[-2:])] * len({row.numpy().tobytes() for row in pixels}))
        return encode(self, pixels)

    monkeypatch.setattr(StableDiffusion, "encode_images", encode_images)
    build_store(tmp_path / "store", dataset, backbone, DataConfig(resolution=SIDE))
    assert made == [(32, 32)] * 50
    made.clear()
    store = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert sorted(made) == [(24, 40)] * 20 + [(40, 24)] * 10
    assert [len(shards) for shards in store.latents] == [50, 20, 10]


def test_one_image_in_rows_of_two_shapes(tmp_path, backbone):
    image = encoded(noise(0, 40, 40))
    rows = make_pairs(
        2, chosen=[image] * 2, rejected=[encoded(noise(n, *size)) for n, size in ((1, (40, 40)), (2, (90, 30)))]
    )
    dataset = PreferenceDataset.open(write_pairs(tmp_path / "data", rows))
    store = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert [store.read([View(row, 0)])[0].shape for row in (0, 1)] == [(1, 4, 8, 8), (1, 4, 6, 10)]


def test_a_row_does_not_depend_on_what_else_is_encoded(tmp_path, dataset, backbone):
    """Bit for bit: in parts, in other company, and at once."""
    whole = build_store(tmp_path / "whole", dataset, backbone, DATA)
    for start in (7, 0):
        part = replace(dataset, left_out=dict.fromkeys([*range(start), *range(start + 6, 25, 2)], "x"))
        build_store(tmp_path / "parts", part, backbone, DATA)
    assert same(build_store(tmp_path / "parts", dataset, backbone, DATA), whole)


def test_broken_images_are_named_and_not_tried_twice(tmp_path, backbone, monkeypatch):
    rows = make_mixed(25)
    rows[7] = replace(rows[7], rejected=truncated_jpeg())
    dataset = PreferenceDataset.open(write_pairs(tmp_path / "data", rows))
    first = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert list(first.bad) == [7] and (np.delete(first.places, 7, axis=0) >= 0).all()
    monkeypatch.setattr(Pictures, "group_images", lambda *_: pytest.fail("an image was read"))
    assert build_store(tmp_path / "store", dataset, backbone, DATA).bad == first.bad


def test_flipped_bits_in_any_shard_are_never_read(tmp_path, dataset, backbone):
    first = build_store(tmp_path / "store", dataset, backbone, DATA)
    files = sorted((tmp_path / "store").glob("latents-*.safetensors"))
    assert len(files) == 3
    for number in range(15):
        file = files[number % 3]
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[number * 7919 % len(content)] ^= 1 << number % 8
        file.write_bytes(damaged)
        try:
            assert same(build_store(tmp_path / "store", dataset, backbone, DATA), first)
        except RunError as error:
            assert "is damaged" in str(error)
        file.write_bytes(content)
        for newer in set((tmp_path / "store").glob("latents-*")) - {*files, *(f.with_suffix(".json") for f in files)}:
            newer.unlink()


def test_two_builders_make_each_latent_once(tmp_path, dataset, backbone, pipeline):
    command = [sys.executable, "-m", "diffpref", "data", "cache", str(dataset.path), "--model", str(pipeline)]
    command += ["--resolution", str(SIDE), "--buckets", "--bucket-step", "8", "--cache", str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        while other.poll() is None and not (tmp_path / "store" / ".claims").exists():
            time.sleep(0.005)
        build_store(tmp_path / "store", dataset, backbone, DATA)
        assert other.communicate(timeout=300)[0].endswith("buckets: 32x32: 10, 40x24: 10, 24x40: 5\n")
    assert other.returncode == 0
    store = build_store(tmp_path / "store", dataset, backbone, DATA)
    assert [len(shards) for shards in store.latents] == [20, 20, 10]
    assert same(store, build_store(tmp_path / "alone", dataset, backbone, DATA))


def loader(dataset: PreferenceDataset, store, backbone, data: DataConfig = DATA, items="pairs", run: int = 4) -> Loader:
    return Loader(dataset, store, backbone, data, list(range(len(dataset))), 0, items, run)


class TestLoader:
    @pytest.mark.parametrize("items", ["pairs", "liked", "judged"])
    @pytest.mark.parametrize("shuffle", ["full", "block"])
    def test_a_run_has_one_shape_and_every_item_comes(self, tmp_path, dataset, backbone, items, shuffle):
        data = replace(DATA, shuffle=shuffle, shuffle_block=5)
        given = loader(dataset, build_store(tmp_path / "store", dataset, backbone, DATA), backbone, data, items)
        count = 50 if items == "judged" else 25
        assert len(given) == count and given.shapes() == [2 * count // 5, 2 * count // 5, count // 5]
        seen: list[str] = []
        for run in range(4 * count // 4):
            batch = given.batch(list(range(4 * run, 4 * run + 4)))
            bucket = BUCKETS[int(batch.id[0].removeprefix("pair-").split(":")[0]) % 5]
            assert batch.latents.shape[1:] == ((4, 8, 8), (4, 6, 10), (4, 10, 6))[bucket]
            seen += batch.id
        assert len(set(seen)) == count and {seen.count(name) for name in seen} <= {3, 4, 5}

    def test_a_pairs_two_images_share_the_shape_and_stand_in_halves(self, tmp_path, dataset, backbone):
        given = loader(dataset, build_store(tmp_path / "store", dataset, backbone, DATA), backbone)
        for run in range(6):
            batch = given.batch(list(range(4 * run, 4 * run + 4)))
            for place, name in enumerate(batch.id):
                for half in range(2):
                    direct = 0.6 * expected(dataset, backbone, int(name.removeprefix("pair-")), half)
                    torch.testing.assert_close(batch.latents[4 * half + place], direct, atol=2e-3, rtol=2e-3)

    def test_a_sample_depends_on_its_place_alone(self, tmp_path, dataset, backbone):
        data = replace(DATA, flip=True, prompt_dropout=0.3)
        given = loader(dataset, build_store(tmp_path / "store", dataset, backbone, data), backbone, data)
        for run in (9, 0, 30):
            whole = given.batch(list(range(4 * run, 4 * run + 4)))
            assert len(set(whole.draw)) == 4
            part = replace(given).batch([4 * run + 3, 4 * run + 1])
            assert part.id == (whole.id[3], whole.id[1]) and part.draw == (whole.draw[3], whole.draw[1])
            assert torch.equal(part.latents, whole.latents[[3, 1, 7, 5]])

    def test_batches_of_the_first_places_have_one_shape_each(self, tmp_path, dataset, backbone):
        given = loader(dataset, build_store(tmp_path / "store", dataset, backbone, DATA), backbone, run=1)
        found = list(given.batches(range(25), 4))
        assert sorted(place for places in found for place in places) == list(range(25))
        assert sorted(map(len, found)) == [1, 2, 2, 4, 4, 4, 4, 4]
        assert sorted(name for places in found for name in given.batch(places).id) == sorted(dataset.ids)

    def test_single_images(self, tmp_path, backbone):
        rows = [replace(row, image=encoded(noise(n, *MIXED[n % 5]))) for n, row in enumerate(make_images(10))]
        dataset = PreferenceDataset.open(write_rows(tmp_path / "data", rows))
        given = loader(
            dataset, build_store(tmp_path / "store", dataset, backbone, DATA), backbone, items="liked", run=2
        )
        shapes = {tuple(given.batch([2 * run, 2 * run + 1]).latents.shape) for run in range(10)}
        assert shapes == {(2, 4, 8, 8), (2, 4, 6, 10), (2, 4, 10, 6)}


class TestUncached:
    @pytest.mark.parametrize("latents", ["mean", "moments"])
    def test_batches_are_the_stores_but_for_its_rounding(self, tmp_path, dataset, backbone, latents):
        data = replace(DATA, flip=True, latents=latents)
        stored = loader(dataset, build_store(tmp_path / "store", dataset, backbone, data), backbone, data)
        direct = replace(stored, store=direct_of(tmp_path, dataset, backbone, data))
        for run in range(8):
            places = list(range(4 * run, 4 * run + 4))
            ours, theirs = direct.batch(places), stored.batch(places)
            assert ours.id == theirs.id and ours.draw == theirs.draw
            torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-2, rtol=1e-2)

    def test_a_random_crop_has_the_buckets_shape(self, tmp_path, dataset, backbone):
        data = replace(DATA, crop="random", cache="none")
        source = direct_of(tmp_path, dataset, backbone, data)
        pixels = to_pixels(decode(dataset.image_bytes(4, "chosen")), (40, 24), "random", 0.75, 0.0)  # of 90 x 30
        middle = to_pixels(decode(dataset.image_bytes(4, "chosen")), (40, 24), "center")
        found = source.read([View(4, 0, left=0.75)])[0]
        torch.testing.assert_close(found, backbone.encode_images(pixels[None]))
        assert not torch.equal(pixels, middle)

    def test_what_cannot_be_read_is_replaced_within_its_shape(self, tmp_path, backbone):
        rows = make_mixed(100)
        rows[6] = replace(rows[6], chosen=truncated_jpeg(), rejected=encoded(noise(1, 60, 36)))
        given = PreferenceDataset.open(write_pairs(tmp_path / "data", rows))
        source = direct_of(tmp_path, given, backbone, DATA)
        assert source.buckets.of_row[6] == 1
        found = loader(given, source, backbone)
        place = next(p for p in range(100) if found._sample(p).name == "pair-6")
        batch = found.batch([place])
        assert batch.latents.shape == (2, 4, 6, 10) and batch.id == (found._sample(place, 1).name,)


def direct_of(folder: Path, dataset: PreferenceDataset, backbone, data: DataConfig) -> Direct:
    return Direct(dataset, backbone, data, assign_buckets(folder / "sizes", dataset, data))


class TestRefused:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (replace(DATA, bucket_step=2), "data.bucket_step: 2 is no multiple of the VAE's 4"),
            (replace(DATA, resolution=30, bucket_step=10), "resolution: 30 is no multiple of the VAE's 4"),
            (replace(DATA, bucket_step=5), "data.bucket_step: the resolution of 32 is no multiple of 5"),
        ],
    )
    def test_shapes_that_the_vae_cannot_take(self, tmp_path, dataset, backbone, data, message):
        with pytest.raises(UserError) as caught:
            build_store(tmp_path / "store", dataset, backbone, data)
        assert str(caught.value) == message and not (tmp_path / "store").exists()

    def test_a_bucket_beyond_the_networks_positions(self, tmp_path):
        network = load_backbone(
            ModelConfig(str(FAMILIES["sd3"](tmp_path / "sd3"))), torch.device("cpu"), torch.float32, trainable=False
        )
        refuse_sizes(network, replace(DATA, resolution=64, bucket_max_aspect=1.0))
        with pytest.raises(UserError) as caught:
            refuse_sizes(network, replace(DATA, resolution=64))
        assert str(caught.value) == "data.bucket_max_aspect: 72 is above this network's 64"  # 64^2 / 56 = 73.1

    def test_a_step_of_one_shape_is_of_no_matter(self, backbone):
        refuse_sizes(backbone, replace(DATA, bucket_step=1, bucket_max_aspect=1.0))

    def test_without_buckets_there_are_squares(self, dataset, backbone):
        source = make_direct(dataset, backbone, replace(DATA, buckets=False))
        assert source.read([View(0, 0), View(1, 0)])[0].shape == (2, 4, 8, 8)
