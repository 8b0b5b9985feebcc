"""The loader: the sample at a place is a function of the place, and a prompt stands on one side of the split."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.datasets import make_images, write_rows
from support.tiny import SIDE, load, make_direct, make_pairs, write_pairs

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import decode
from diffpref.data.loader import Loader
from diffpref.data.pixels import to_pixels
from diffpref.data.store import build_store
from diffpref.data.views import View
from diffpref.draws import block_permutation, draw_seed, generator, permutation
from diffpref.train.config import DataConfig
from diffpref.types import Items

PAIRS = 12
DATA = DataConfig(resolution=SIDE)
FLIP = replace(DATA, flip=True)


@pytest.fixture(scope="module")
def opened(tmp_path_factory, pipeline):
    """A dataset of twelve pairs with captions of their own, its store with mirrored images, and the backbone."""
    folder, backbone = tmp_path_factory.mktemp("loader"), load(pipeline)
    captions = {
        "chosen_prompt": [f"chosen {n}" for n in range(PAIRS)],
        "rejected_prompt": [f"rejected {n}" for n in range(PAIRS)],
        "label": [1.0] * 8 + [0.0, 0.25, 0.5, 0.5],
        "weight": [1.0 + n for n in range(PAIRS)],
    }
    dataset = PreferenceDataset.open(write_pairs(folder / "data", make_pairs(PAIRS, **captions)))
    return dataset, build_store(folder / "store", dataset, backbone, FLIP), backbone


@pytest.fixture
def loader(opened):
    """Makes a loader of the pairs with these settings."""

    def make(rows=None, seed: int = 0, items: Items = "pairs", **data) -> Loader:
        dataset, store, backbone = opened
        rows = list(range(PAIRS)) if rows is None else rows
        return Loader(dataset, store, backbone, replace(DATA, **data), rows, seed, items)

    return make


def sides(loader: Loader, row: int, mirrored: bool = False) -> list[torch.Tensor]:
    """The scaled latents of a row's chosen and rejected image."""
    return list(loader.store.read([View(row, side, mirrored) for side in range(2)])[0] * 0.6)


def row_of(name: str) -> int:
    return int(name.removeprefix("pair-"))


class TestOrder:
    def test_a_sample_depends_on_its_place_alone(self, loader):
        whole = loader(flip=True, prompt_dropout=0.3).batch(list(range(30)))
        for places in ([5], [29, 3, 17], [0, 1]):
            part = loader(flip=True, prompt_dropout=0.3).batch(places)
            rows = [*places, *(30 + place for place in places)]
            assert part.id == tuple(whole.id[place] for place in places)
            assert part.draw == tuple(whole.draw[place] for place in places)
            assert torch.equal(part.latents, whole.latents[rows])
            assert torch.equal(part.cond["text"], whole.cond["text"][rows])
            assert torch.equal(part.label, whole.label[places]) and torch.equal(part.weight, whole.weight[places])

    def test_epochs_are_permutations_that_differ(self, loader):
        names = loader().batch(list(range(3 * PAIRS))).id
        epochs = [names[start : start + PAIRS] for start in range(0, 3 * PAIRS, PAIRS)]
        assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == PAIRS for epoch in epochs)
        assert len(set(epochs)) == 3

    def test_the_seed_changes_order_and_draws(self, loader):
        first, second = loader(seed=0).batch(list(range(PAIRS))), loader(seed=1).batch(list(range(PAIRS)))
        assert first.id != second.id and not set(first.draw) & set(second.draw)

    def test_every_sample_of_every_epoch_has_its_own_draw(self, loader):
        assert len(set(loader().batch(list(range(100))).draw)) == 100

    def test_only_the_given_rows_come(self, loader):
        assert set(loader(rows=[2, 5, 7]).batch(list(range(9))).id) == {"pair-2", "pair-5", "pair-7"}


class TestRows:
    def test_chosen_first_then_rejected_each_with_its_caption(self, loader):
        given = loader(rows=[0, 1, 2, 3])
        batch = given.batch([0, 1])
        prompts = []
        for place, name in enumerate(batch.id):
            chosen, rejected = sides(given, row_of(name))
            assert torch.equal(batch.latents[place], chosen) and torch.equal(batch.latents[2 + place], rejected)
            prompts.append(f"chosen {row_of(name)}")
        prompts += [prompt.replace("chosen", "rejected") for prompt in prompts]
        assert torch.equal(batch.cond["text"], given.store.prompts(prompts)["text"])
        assert batch.weight.tolist() == [1.0 + row_of(name) for name in batch.id]
        assert batch.label.tolist() == [1.0, 1.0]

    def test_single_images_are_the_chosen_ones(self, loader):
        both, single = loader(flip=True).batch([0, 1, 2]), loader(flip=True, items="liked").batch([0, 1, 2])
        assert torch.equal(single.latents, both.latents[:3]) and single.id == both.id and single.draw == both.draw
        assert torch.equal(single.cond["text"], both.cond["text"][:3])

    @pytest.mark.parametrize(("row", "label"), [(8, 1.0), (9, 0.75)])
    def test_a_label_below_a_half_swaps_the_images(self, loader, row, label):
        given = loader(rows=[row])
        batch = given.batch([0])
        chosen, rejected = sides(given, row)
        assert batch.label.tolist() == [label]
        assert torch.equal(batch.latents, torch.stack([rejected, chosen]))
        prompts = [f"rejected {row}", f"chosen {row}"]
        assert torch.equal(batch.cond["text"], given.store.prompts(prompts)["text"])


class TestTies:
    def test_soft_ties_keep_their_label(self, loader):
        given = loader(rows=[10], ties="soft")
        batch = given.batch([0])
        assert batch.label.tolist() == [0.5]
        assert torch.equal(batch.latents, torch.stack(sides(given, 10)))

    def test_random_ties_get_a_winner_that_the_seed_and_the_id_fix(self, loader):
        winners = []
        for seed in range(40):
            given = loader(rows=[10, 11], ties="random", seed=seed)
            batch = given.batch(list(range(6)))
            assert batch.label.tolist() == [1.0] * 6
            found = {}
            for place, name in enumerate(batch.id):
                first = torch.equal(batch.latents[place], sides(given, row_of(name))[0])
                assert found.setdefault(name, first) == first  # the same in every epoch
            winners.append((found["pair-10"], found["pair-11"]))
        assert set(winners) == {(a, b) for a in (True, False) for b in (True, False)}
        assert 25 < sum(a + b for a, b in winners) < 55  # of 80; four standard deviations are 18


class TestDropoutAndFlip:
    def test_prompts_of_a_pair_are_dropped_together_at_the_given_rate(self, loader):
        given, count = loader(prompt_dropout=0.3), 1200
        batch = given.batch(list(range(count)))
        empty = given.store.prompts([""])["text"]
        gone = (batch.cond["text"] == empty).flatten(1).all(dim=1)
        assert torch.equal(gone[:count], gone[count:])
        assert abs(gone[:count].float().mean().item() - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5

    def test_none_are_dropped_at_rate_0(self, loader):
        given = loader()
        empty = given.store.prompts([""])["text"]
        assert not (given.batch(list(range(100))).cond["text"] == empty).flatten(1).all(dim=1).any()

    def test_half_the_pairs_are_mirrored_both_images_alike(self, loader):
        given, count = loader(rows=list(range(8)), flip=True), 400
        batch = given.batch(list(range(count)))
        mirrored = []
        for place, name in enumerate(batch.id):
            pair = torch.stack([batch.latents[place], batch.latents[count + place]])
            kinds = [torch.equal(pair, torch.stack(sides(given, row_of(name), flip))) for flip in (False, True)]
            assert sum(kinds) == 1
            mirrored.append(kinds[1])
        assert abs(sum(mirrored) - count / 2) < 4 * (count / 4) ** 0.5

    def test_nothing_is_mirrored_unless_asked(self, loader):
        given = loader(rows=list(range(8)))
        batch = given.batch(list(range(40)))
        assert all(torch.equal(batch.latents[n], sides(given, row_of(name))[0]) for n, name in enumerate(batch.id))

    def test_flip_and_dropout_are_independent(self, loader):
        given, count = loader(rows=list(range(8)), flip=True, prompt_dropout=0.5), 400
        batch = given.batch(list(range(count)))
        empty = given.store.prompts([""])["text"]
        gone = (batch.cond["text"][:count] == empty).flatten(1).all(dim=1).tolist()
        flips = [torch.equal(batch.latents[n], sides(given, row_of(name), True)[0]) for n, name in enumerate(batch.id)]
        counts = Counter(zip(gone, flips, strict=True))
        assert len(counts) == 4 and min(counts.values()) > 60


class TestOrderOfExistingRuns:
    def test_places_and_draws_are_these_functions_of_the_seed(self, loader):
        """Changing them would silently change every run that was ever made; they are part of the promise."""
        given = loader(rows=[1, 4, 6, 9, 11], seed=5)
        batch = given.batch(list(range(10)))
        for place in range(10):
            epoch, k = divmod(place, 5)
            row = given.rows[permutation(5, epoch, 5)[k]]
            assert batch.id[place] == f"pair-{row}"
            assert batch.draw[place] == draw_seed(5, "sample", epoch, k)


class TestIndependentAugmentation:
    def test_each_side_is_mirrored_by_its_own_coin(self, loader):
        given, count = loader(rows=list(range(8)), flip=True, augmentation="independent"), 400
        batch = given.batch(list(range(count)))
        kinds = Counter()
        for place, name in enumerate(batch.id):
            found = []
            for half in range(2):
                latents = batch.latents[place + half * count]
                same = [torch.equal(latents, sides(given, row_of(name), flip)[half]) for flip in (False, True)]
                assert sum(same) == 1
                found.append(same[1])
            kinds[tuple(found)] += 1
        assert len(kinds) == 4 and min(kinds.values()) > 60  # of 100 expected

    def test_single_images_are_mirrored_as_ever(self, loader):
        kinds = [
            loader(flip=True, items="liked", augmentation=kind).batch(list(range(20))).latents
            for kind in ("shared", "independent")
        ]
        assert torch.equal(*kinds)

    def test_random_crops_lie_apart_or_together(self, loader):
        for kind, alike in (("shared", True), ("independent", False)):
            given = loader(crop="random", augmentation=kind)
            views = [given._sample(place).views for place in range(200)]
            assert all(((a.left, a.top) == (b.left, b.top)) == alike for a, b in views)
            spots = torch.tensor([[a.left, a.top] for a, _ in views])
            assert ((spots.mean(dim=0) - 0.5).abs() < 4 * (1 / 12 / 200) ** 0.5).all()
            assert abs(spots.T.corrcoef()[0, 1]) < 4 / 200**0.5


class TestJudged:
    def test_both_images_of_a_pair_are_items_with_their_labels(self, loader):
        given = loader(rows=[0, 2, 8], items="judged")
        assert len(given) == 6
        batch = given.batch(list(range(6)))
        expected = {"pair-0": (0, 1), "pair-2": (0, 1), "pair-8": (1, 0)}  # row 8's label is 0
        seen = {}
        for place, name in enumerate(batch.id):
            row, side = name.split(":")
            half = ("chosen", "rejected").index(side)
            assert torch.equal(batch.latents[place], sides(given, row_of(row))[half])
            prompt = f"{side} {row_of(row)}"
            assert torch.equal(batch.cond["text"][place], given.store.prompts([prompt])["text"][0])
            assert batch.weight[place] == 1.0 + row_of(row)
            seen[row, half] = batch.label[place].item()
        assert seen == {(row, half): float(half == order[0]) for row, order in expected.items() for half in (0, 1)}
        assert len(batch.latents) == len(batch.draw) == len(set(batch.draw)) == 6

    def test_soft_labels_are_rounded_unless_ties_are_soft(self, loader):
        def labels(**data) -> dict[str, float]:
            batch = loader(rows=[9], items="judged", **data).batch([0, 1])
            return dict(zip(batch.id, batch.label.tolist(), strict=True))

        assert labels() == {"pair-9:chosen": 0.0, "pair-9:rejected": 1.0}  # row 9's label is 0.25
        assert labels(ties="soft") == {"pair-9:chosen": 0.25, "pair-9:rejected": 0.75}

    def test_a_tie_is_a_coin_or_a_half(self, loader):
        winners = set()
        for seed in range(20):
            batch = loader(rows=[10], items="judged", ties="random", seed=seed).batch([0, 1, 2, 3])
            found = dict(zip(batch.id, batch.label.tolist(), strict=True))
            assert sorted(found.values()) == [0.0, 1.0]
            winners.add(found["pair-10:chosen"])
        assert winners == {0.0, 1.0}
        assert loader(rows=[10], items="judged", ties="soft").batch([0, 1]).label.tolist() == [0.5, 0.5]

    def test_a_sample_depends_on_its_place_alone(self, loader):
        given = loader(items="judged", ties="soft", flip=True)
        whole = given.batch(list(range(40)))
        for place in (0, 7, 39):
            part = given.batch([place])
            assert (part.id[0], part.draw[0]) == (whole.id[place], whole.draw[place])
            assert torch.equal(part.latents[0], whole.latents[place]) and part.label[0] == whole.label[place]
        assert len(set(whole.id[:24])) == 24 and sorted(whole.id[:16]) != sorted(whole.id[24:])


class TestSingleImages:
    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory, pipeline):
        folder, backbone = tmp_path_factory.mktemp("single"), load(pipeline)
        rows = make_images(6, label=[1.0, 0.0, None, 0.75, 0.5, 0.25], image_prompt=[f"own {n}" for n in range(6)])
        dataset = PreferenceDataset.open(write_rows(folder / "data", rows))
        return dataset, build_store(folder / "store", dataset, backbone, FLIP), backbone

    def loader(self, made, rows: list[int], items: Items, **data) -> Loader:
        return Loader(*made, replace(DATA, **data), rows, 0, items)

    @pytest.mark.parametrize("items", ["liked", "judged"])
    def test_a_row_is_an_item(self, made, items):
        given = self.loader(made, [0, 1, 3], items)
        batch = given.batch([0, 1, 2])
        assert len(given) == 3 and sorted(batch.id) == ["image-0", "image-1", "image-3"]
        for place, name in enumerate(batch.id):
            row = int(name.removeprefix("image-"))
            assert torch.equal(batch.latents[place], given.store.read([View(row, 0)])[0][0] * 0.6)
            assert torch.equal(batch.cond["text"][place], given.store.prompts([f"own {row}"])["text"][0])

    def test_labels_are_rounded_unless_ties_are_soft(self, made):
        def labels(**data) -> dict[str, float]:
            batch = self.loader(made, [0, 1, 3, 5], "judged", **data).batch([0, 1, 2, 3])
            return dict(zip(batch.id, batch.label.tolist(), strict=True))

        assert labels() == {"image-0": 1.0, "image-1": 0.0, "image-3": 1.0, "image-5": 0.0}
        assert labels(ties="soft") == {"image-0": 1.0, "image-1": 0.0, "image-3": 0.75, "image-5": 0.25}

    def test_a_tie_is_a_coin(self, made):
        given = self.loader(made, [4], "judged", ties="random")
        assert {replace(given, seed=seed).batch([0]).label.item() for seed in range(20)} == {0.0, 1.0}
        assert self.loader(made, [4], "judged", ties="soft").batch([0]).label.item() == 0.5


class TestBlockShuffle:
    def test_a_place_has_the_sample_of_that_order_in_every_epoch(self, loader):
        given = loader(shuffle="block", shuffle_block=2, seed=4)
        whole = given.batch(list(range(3 * PAIRS)))
        for epoch in range(3):
            expected = block_permutation(4, epoch, PAIRS, 2)
            assert [row_of(name) for name in whole.id[epoch * PAIRS :][:PAIRS]] == expected.tolist()
        part = given.batch([30, 7])
        assert part.id == (whole.id[30], whole.id[7]) and torch.equal(part.latents[0], whole.latents[30])


class TestMoments:
    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory, pipeline):
        folder, backbone = tmp_path_factory.mktemp("moments"), load(pipeline)
        dataset = PreferenceDataset.open(write_pairs(folder / "data", make_pairs(6)))
        data = replace(DATA, latents="moments")
        return dataset, build_store(folder / "store", dataset, backbone, data), backbone, data

    def loader(self, made) -> Loader:
        return Loader(*made, list(range(6)), 0, "pairs")

    def test_a_sample_is_that_of_diffusers_for_the_noise_of_its_draw(self, made):
        dataset, _, backbone, _ = made
        batch = self.loader(made).batch([0, 9])
        for row, (place, half) in enumerate([(0, "chosen"), (1, "chosen"), (0, "rejected"), (1, "rejected")]):
            content = dataset.image_bytes(row_of(batch.id[place]), half)
            posterior = backbone.vae.model.encode(to_pixels(decode(content), (SIDE, SIDE), "center")[None]).latent_dist
            seed = draw_seed(batch.draw[place], f"posterior {half}")
            noise = torch.randn(batch.latents.shape[1:], generator=generator(seed, "posterior"))
            expected = 0.6 * (posterior.mean + posterior.std * noise)[0]
            torch.testing.assert_close(batch.latents[row], expected, atol=5e-3, rtol=5e-3)
            assert (batch.latents[row] - 0.6 * posterior.mean[0]).abs().max() > 0.05

    def test_each_epoch_and_image_has_its_own_and_a_place_always_the_same(self, made):
        given = self.loader(made)
        whole, again = given.batch(list(range(12))), given.batch([11])
        assert torch.equal(again.latents[0], whole.latents[11]) and torch.equal(again.latents[1], whole.latents[23])
        first, second = (whole.id.index("pair-2", start) for start in (0, 6))
        assert not torch.equal(whole.latents[first], whole.latents[second])

    def test_uncached_it_is_the_same_but_for_rounding(self, made):
        dataset, _, backbone, data = made
        direct = replace(self.loader(made), store=make_direct(dataset, backbone, data))
        ours, theirs = direct.batch([0, 9]).latents, self.loader(made).batch([0, 9]).latents
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)

    def test_mean_and_moments_share_a_folder(self, made, tmp_path):
        dataset, _, backbone, data = made
        shapes = [
            build_store(tmp_path / "store", dataset, backbone, replace(data, latents=kind)).latents[0].shape
            for kind in ("mean", "moments", "mean")
        ]
        assert shapes == [(4, 8, 8), (8, 8, 8), (4, 8, 8)]
