"""Uncached training: the same numbers as the store's, and a broken row leaves the other places as they were."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.datasets import encoded, make_images, noise, truncated_jpeg, write_rows
from support.tiny import SIDE, load, make_direct, make_pairs, write_pairs

from diffpref.data import direct
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import decode
from diffpref.data.loader import Loader
from diffpref.data.pixels import to_pixels
from diffpref.data.store import build_store
from diffpref.data.views import View
from diffpref.draws import permutation
from diffpref.errors import RunError, UserError
from diffpref.train.config import DataConfig

DATA = DataConfig(resolution=SIDE, flip=True, prompt_dropout=0.3, cache="none")
PLACES = list(range(30))


@pytest.fixture(scope="module")
def backbone(pipeline):
    return load(pipeline)


def pairs(folder: Path, count: int = 12, **columns) -> PreferenceDataset:
    return PreferenceDataset.open(write_pairs(folder, make_pairs(count, **columns)))


def uncached(dataset: PreferenceDataset, backbone, data: DataConfig = DATA, items="pairs") -> Loader:
    rows = list(range(len(dataset)))
    return Loader(dataset, make_direct(dataset, backbone, data), backbone, data, rows, 0, items)


@pytest.mark.parametrize("data", [DATA, replace(DATA, augmentation="independent", crop="none", resolution=16)])
@pytest.mark.parametrize("items", ["pairs", "liked", "judged"])
def test_batches_are_the_stores_but_for_its_rounding(tmp_path, backbone, data, items):
    dataset = pairs(tmp_path / "data")
    direct = uncached(dataset, backbone, data, items)
    stored = replace(direct, store=build_store(tmp_path / "store", dataset, backbone, data))
    ours, theirs = direct.batch(PLACES), stored.batch(PLACES)
    assert (ours.id, ours.draw) == (theirs.id, theirs.draw)
    assert torch.equal(ours.label, theirs.label) and torch.equal(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours.cond["text"], theirs.cond["text"], atol=1e-3, rtol=1e-3)
    assert not torch.equal(ours.latents, theirs.latents)  # the store's are rounded to fp16


def test_single_images_too(tmp_path, backbone):
    dataset = PreferenceDataset.open(write_rows(tmp_path / "data", make_images(5)))
    direct = uncached(dataset, backbone, items="liked")
    stored = replace(direct, store=build_store(tmp_path / "store", dataset, backbone, DATA))
    torch.testing.assert_close(direct.batch(PLACES).latents, stored.batch(PLACES).latents, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_sample_depends_on_its_place_alone_to_the_last_bit(tmp_path, backbone, crop):
    chosen = [encoded(noise(n, SIDE + n, SIDE)) for n in range(12)]
    loader = uncached(pairs(tmp_path / "data", chosen=chosen), backbone, replace(DATA, crop=crop))
    whole = loader.batch(PLACES)
    for places in ([7], [29, 0, 4]):
        part = replace(loader, store=make_direct(loader.dataset, backbone, loader.data)).batch(places)
        rows = [*places, *(30 + place for place in places)]
        assert torch.equal(part.latents, whole.latents[rows])
        assert torch.equal(part.cond["text"], whole.cond["text"][rows])


def test_a_random_crop_is_taken_where_the_draw_says_then_mirrored(tmp_path, backbone):
    dataset = pairs(tmp_path / "data", 1, chosen=[encoded(noise(1, 2 * SIDE, SIDE))])
    source = make_direct(dataset, backbone, replace(DATA, crop="random"))
    for mirrored in (False, True):
        pixels = to_pixels(decode(dataset.image_bytes(0, "chosen")), (SIDE, SIDE), "random", 0.25, 0.0)
        (found,) = source.read([View(0, 0, mirrored, left=0.25, top=0.0)])[0]
        assert torch.equal(found, backbone.encode_images((pixels.flip(2) if mirrored else pixels)[None])[0])
    views = [uncached(dataset, backbone, source.data)._sample(place).views[0] for place in range(8)]
    assert len({view.left for view in views}) == 8


class TestBrokenRows:
    @pytest.fixture
    def dataset(self, tmp_path):
        rejected = [truncated_jpeg() if n in (3, 4) else encoded(noise(n, SIDE, SIDE)) for n in range(60)]
        return pairs(tmp_path / "data", 60, rejected=rejected)

    def test_the_next_in_the_epochs_order_takes_the_place_with_the_places_draw(self, dataset, backbone):
        loader = uncached(dataset, backbone)
        batch = loader.batch(list(range(60)))
        order = permutation(0, 0, 60).tolist()
        for place, row in enumerate(order):
            taken = next(other for other in order[place:] + order[:place] if other not in (3, 4))
            assert batch.id[place] == f"pair-{taken}"
            assert batch.draw[place] == loader._sample(place).draw
            if row in (3, 4):
                alone = replace(loader, store=make_direct(dataset, backbone, DATA)).batch([place])  # finds it out anew
                assert alone.id == (f"pair-{taken}",)
                assert torch.equal(alone.latents, batch.latents[[place, 60 + place]])

    def test_they_are_named_once_and_kept(self, dataset, backbone, caplog):
        loader = uncached(dataset, backbone)
        with caplog.at_level(logging.WARNING, "diffpref"):
            loader.batch(list(range(60)))
            loader.batch(list(range(60, 120)))
        assert sorted(loader.store.bad) == [3, 4] and "truncated" in loader.store.bad[3].lower()
        assert [record.message.split(":")[0] for record in caplog.records] == [
            f"row pair-{row} cannot be read, another takes its place" for row in loader.store.bad
        ]

    def test_over_five_in_a_hundred_of_those_seen_stop(self, tmp_path, backbone, monkeypatch):
        rejected = [b"no image" if n % 10 == 0 else encoded(noise(n, SIDE, SIDE)) for n in range(40)]
        loader = uncached(pairs(tmp_path / "data", 40, rejected=rejected), backbone)
        with pytest.raises(UserError, match=r"^3 of 40 rows have images that cannot be read \(over 5%\)"):
            for place in range(40):
                loader.batch([place])
        monkeypatch.setattr(direct, "JUDGED_FROM", 10)
        again = replace(loader, store=make_direct(loader.dataset, backbone, DATA))
        with pytest.raises(UserError, match=r"^1 of 1\d rows"):  # the first is one of 10 to 19 seen
            again.batch(list(range(12)))

    def test_a_single_broken_row_is_no_endless_search(self, tmp_path, backbone):
        loader = uncached(pairs(tmp_path / "data", 1, chosen=[b""]), backbone)
        with pytest.raises(UserError, match="1 of 1 rows have images that cannot be read"):
            loader.batch([0])


def test_latents_that_are_not_finite_stop(tmp_path, pipeline):
    broken = load(pipeline)
    with torch.no_grad():
        next(iter(broken.vae.model.parameters())).fill_(float("nan"))
    with pytest.raises(RunError, match="the VAE's latents of row pair-0 are not finite"):
        make_direct(pairs(tmp_path / "data", 1), broken, DATA).read([View(0, 0)])


def test_prompts_are_remembered_within_their_room(tmp_path, backbone, monkeypatch):
    encode, asked = type(backbone).encode_prompts, []
    monkeypatch.setattr(
        type(backbone), "encode_prompts", lambda self, prompts: asked.extend(prompts) or encode(self, prompts)
    )
    source = make_direct(pairs(tmp_path / "data", 1), backbone, DATA)
    first = source.prompts(["a", "b", "a"])
    assert asked == ["a", "b"] and torch.equal(first["text"][0], first["text"][2])
    row_bytes = first["text"][0].nbytes
    monkeypatch.setattr(direct, "TEXT_BYTES", 2 * row_bytes)
    source.prompts(["a", "c"])  # b was asked for longest ago
    source.prompts(["a", "c", "b", "a"])
    assert asked == ["a", "b", "c", "b", "a"]
    assert len(source._texts) == 2
