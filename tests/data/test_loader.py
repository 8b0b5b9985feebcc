"""The loader: the sample at a place is a function of the place, and a prompt stands on one side of the split."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny import SIDE, load, make_pairs, write_pairs

from diffpref.data.dataset import PairDataset
from diffpref.data.loader import Loader, choose_rows
from diffpref.data.shards import Shards
from diffpref.data.store import Store, build_store
from diffpref.errors import UserError
from diffpref.train.config import DataConfig

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
    dataset = PairDataset.open(write_pairs(folder / "data", make_pairs(PAIRS, **captions)))
    return dataset, build_store(folder / "store", dataset, backbone, FLIP), backbone


@pytest.fixture
def loader(opened):
    """Makes a loader of the pairs with these settings."""

    def make(rows=None, seed: int = 0, pairs: bool = True, **data) -> Loader:
        dataset, store, backbone = opened
        rows = list(range(PAIRS)) if rows is None else rows
        return Loader(dataset, store, backbone, replace(DATA, **data), rows, seed, pairs)

    return make


def sides(loader: Loader, row: int, mirrored: bool = False) -> list[torch.Tensor]:
    """The scaled latents of a row's chosen and rejected image."""
    return [loader.store.images([(sha, mirrored)])[0] * 0.6 for sha in loader.store.hashes[row]]


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
        both, single = loader(flip=True).batch([0, 1, 2]), loader(flip=True, pairs=False).batch([0, 1, 2])
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


def light(prompts: list[str], labels: list[float] | None = None) -> tuple[PairDataset, Store]:
    """A dataset without files, for `choose_rows`, which looks at the light columns alone."""
    import numpy as np

    count = len(prompts)
    names, columns = [str(row) for row in range(count)], [prompts] * 3
    values = np.array(labels or [1.0] * count), np.ones(count)
    dataset = PairDataset(Path("nowhere"), "train", names, *columns, *values, ())
    return dataset, Store(Shards(Path("nowhere"), "latents", ""), {}, [("a", "b")] * count, {})


class TestChoice:
    def test_no_prompt_stands_on_both_sides_and_the_share_is_about_right(self):
        prompts = [f"prompt {n // 3}" for n in range(3000)]
        choice = choose_rows(*light(prompts), replace(DATA, holdout=0.2))
        train, heldout = ({prompts[row] for row in rows} for rows in (choice.train, choice.heldout))
        assert not train & heldout and len(train | heldout) == 1000
        assert sorted(choice.train + choice.heldout) == list(range(3000))
        assert abs(len(heldout) - 200) < 4 * 160**0.5

    def test_more_rows_and_a_larger_share_move_no_prompt_back(self):
        prompts = [f"prompt {n}" for n in range(400)]
        few = choose_rows(*light(prompts[:200]), replace(DATA, holdout=0.2))
        many = choose_rows(*light(prompts), replace(DATA, holdout=0.2))
        larger = choose_rows(*light(prompts), replace(DATA, holdout=0.4))
        assert few.heldout == [row for row in many.heldout if row < 200]
        assert set(many.heldout) < set(larger.heldout)

    def test_nothing_is_held_out_by_default(self):
        assert choose_rows(*light(["a", "b"]), DATA).heldout == []

    def test_ties_are_dropped_and_counted_only_if_so_configured(self):
        given = light(["a", "b", "c"], [1.0, 0.5, 0.0])
        assert choose_rows(*given, DATA).train == [0, 2]
        assert choose_rows(*given, DATA).dropped == {"unreadable": 0, "ties": 1}
        for ties in ("random", "soft"):
            choice = choose_rows(*given, replace(DATA, ties=ties))
            assert choice.train == [0, 1, 2] and choice.dropped["ties"] == 0

    def test_all_ties_are_refused(self):
        with pytest.raises(UserError) as error:
            choose_rows(*light(["a", "b"], [0.5, 0.5]), DATA)
        assert str(error.value) == "all 2 pairs are ties; train on them with --data.ties soft or random"

    def test_nothing_left_to_train_on_is_refused_with_the_reasons(self):
        dataset, store = light(["a", "b", "c"], [0.5, 1.0, 1.0])
        store = replace(store, hashes=[("a", "b"), None, ("a", "b")])
        with pytest.raises(UserError) as error:
            choose_rows(dataset, store, replace(DATA, holdout=0.999999))
        assert str(error.value) == "no pair of 3 is left to train on: 1 unreadable, 1 ties, 1 held out"
