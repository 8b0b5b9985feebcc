"""What a configuration makes of its data before and after the model is there, and what it refuses."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.datasets import encoded, make_images, noise, write_rows
from support.tiny import SIDE, load, make_pairs, write_pairs

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.direct import Direct
from diffpref.data.store import Store
from diffpref.embedded.describer import describe
from diffpref.embedded.judge import judge
from diffpref.errors import UserError
from diffpref.objectives import DPO, KTO, SFT
from diffpref.points import Independent, Paired, Replay
from diffpref.train.check import check
from diffpref.train.config import Config, DataConfig
from diffpref.train.preferences import dataset_path, items_of, make_embedded, open_dataset, open_preferences, store_path


@dataclass(frozen=True)
class Alone:
    """An accelerator of one process."""

    is_main_process: bool = True
    num_processes: int = 1

    def wait_for_everyone(self) -> None:
        """Nobody to wait for."""


KINDS = {
    "pairs": {"objective": DPO(), "points": Paired()},
    "liked": {"objective": SFT(), "points": Independent()},
    "judged": {"objective": KTO(), "points": Independent()},
}


def config(path: Path, items: str = "pairs", **data) -> Config:
    return check(Config(data=DataConfig(path=str(path), resolution=SIDE, **data), **KINDS[items]))


def refused(given: Config) -> str:
    with pytest.raises(UserError) as error:
        open_dataset(given, Alone())
    return str(error.value)


def test_points_and_objective_decide_the_items():
    assert [items_of(config(Path("x"), items)) for items in KINDS] == list(KINDS)
    assert items_of(Config(points=Replay())) == "liked"
    assert items_of(Config(points=Replay(offline_share=0.5))) == "pairs"


class TestRefused:
    """All of it without a model."""

    def test_pairs_wanted_but_single_images_given(self, tmp_path):
        path = write_rows(tmp_path / "data", make_images(4))
        assert refused(config(path)) == (
            f"data.path: {path} holds single images, but the objective 'dpo' on 'paired' points needs pairs "
            "(columns chosen and rejected)"
        )

    @pytest.mark.parametrize(
        ("labels", "counts"),
        [([None] * 4, (0, 0)), ([1.0, 1.0, None, 0.75], (3, 0)), ([0.0, 0.5, 0.0, 0.25], (0, 3))],
    )
    def test_dislikes_wanted_but_none_given(self, tmp_path, labels, counts):
        path = write_rows(tmp_path / "data", make_images(4, label=labels))
        assert refused(config(path, "judged")) == (
            f"data.path: the objective 'kto' needs liked and disliked images, but {path} has {counts[0]} of a label "
            f"above 0.5 and {counts[1]} of one below"
        )

    def test_nothing_liked(self, tmp_path):
        path = write_rows(tmp_path / "data", make_images(2, label=[0.0, 0.25]))
        assert (
            refused(config(path, "liked"))
            == "no image of 2 is left to train on: 0 unreadable, 0 ties, 2 not liked, 0 held out"
        )

    def test_options_that_the_data_lacks(self, tmp_path):
        path = write_pairs(tmp_path / "data", make_pairs(4))
        for data, key in (
            ({"captions": "image"}, "data.captions"),
            ({"choice_model": "hps"}, "data.choice_model"),
            ({"generator": "dream"}, "data.generator"),
            ({"weighting": "margin"}, "data.weighting"),
        ):
            assert refused(config(path, **data)).startswith(f"{key}: {path} ")

    def test_all_ties(self, tmp_path):
        path = write_pairs(tmp_path / "data", make_pairs(4, label=[0.5] * 4))
        assert refused(config(path)).startswith("all 4 pairs are ties")

    def test_the_configuration_itself(self):
        with pytest.raises(UserError, match=r"^data\.choice_temperature: labels come from scores only under"):
            config(Path("x"), choice_temperature=0.1)
        with pytest.raises(UserError, match=r"^data\.choice_temperature: 0\.0 is not a finite number above 0"):
            config(Path("x"), choice_temperature=0.0, choice_model="x")
        with pytest.raises(UserError, match=r"^data\.crop: a random crop"):
            config(Path("x"), crop="random")


class TestOpened:
    @pytest.fixture(scope="class")
    def backbone(self, pipeline):
        return load(pipeline)

    def test_kto_takes_both_images_of_a_pair(self, tmp_path, backbone):
        path = write_pairs(tmp_path / "data", make_pairs(6, label=[1.0, 0.0, 0.5, 1.0, 1.0, 1.0]))
        loader, heldout, choice = open_preferences(config(path, "judged"), backbone, Alone())
        assert "model" not in vars(backbone.vae) and "encoder" not in vars(backbone.text)  # their memory is training's
        assert len(loader) == 10 and heldout is None and choice.dropped == {"unreadable": 0, "ties": 1}
        batch = loader.batch(list(range(10)))
        assert sorted(name for name, label in zip(batch.id, batch.label, strict=True) if label) == [
            "pair-0:chosen",
            "pair-1:rejected",
            *(f"pair-{n}:chosen" for n in (3, 4, 5)),
        ]

    def test_captions_of_images_condition_their_images(self, tmp_path, backbone):
        rows = make_pairs(4, chosen_prompt=list("abcd"), rejected_prompt=list("efgh"))
        path = write_pairs(tmp_path / "data", rows)
        for captions, expected in (("image", "ae"), ("prompt", None)):
            loader, _, _ = open_preferences(config(path, captions=captions), backbone, Alone())
            loader = replace(loader, rows=[0])
            expected = list(expected) if expected else [rows[0].prompt] * 2
            assert torch.equal(loader.batch([0]).cond["text"], loader.store.prompts(expected)["text"])

    def test_margins_weigh_training_and_heldout_rows_by_the_training_mean(self, tmp_path, backbone):
        path = write_pairs(tmp_path / "data", make_pairs(40, margin=[1.0 + n for n in range(40)], weight=[2.0] * 40))
        loader, heldout, choice = open_preferences(config(path, weighting="margin", holdout=0.3), backbone, Alone())
        assert heldout is not None and choice.heldout
        mean = np.mean([1.0 + row for row in choice.train])
        for part in (loader, heldout):
            batch = part.batch(list(range(len(part))))
            margins = [1.0 + int(name.removeprefix("pair-")) for name in batch.id]
            np.testing.assert_allclose(batch.weight, 2 * np.array(margins) / mean, rtol=1e-6)
        assert loader.batch(list(range(len(loader)))).weight.mean().item() == pytest.approx(2.0)

    def test_a_broken_row_is_not_part_of_the_mean(self, tmp_path, backbone):
        chosen = [b"no image" if n == 0 else encoded(noise(n, SIDE, SIDE)) for n in range(20)]
        margins = [1e9] + [1.0] * 19
        path = write_pairs(tmp_path / "data", make_pairs(20, chosen=chosen, margin=margins))
        loader, _, _ = open_preferences(config(path, weighting="margin"), backbone, Alone())
        assert loader.batch([0]).weight.tolist() == [1.0]

    def test_without_a_cache_nothing_is_written(self, tmp_path, backbone):
        path = write_pairs(tmp_path / "data", make_pairs(4))
        loader, _, _ = open_preferences(config(path, cache="none", crop="random"), backbone, Alone())
        assert isinstance(loader.store, Direct)
        loader.batch([0, 1])
        assert [entry.name for entry in tmp_path.iterdir()] == ["data"]
        with pytest.raises(UserError, match="resolution: 30"):
            wrong = config(path, cache="none")
            open_preferences(replace(wrong, data=replace(wrong.data, resolution=30)), backbone, Alone())

    def test_with_one_it_lies_beside_the_data(self, tmp_path, backbone):
        path = write_pairs(tmp_path / "data", make_pairs(4))
        given = config(path)
        loader, _, _ = open_preferences(given, backbone, Alone(), open_dataset(given, Alone()))
        assert isinstance(loader.store, Store)
        assert store_path(given) == tmp_path / "data.cache" and store_path(given).is_dir()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Makes configurations of runs in one folder on the first rows of the embedded preferences."""
    import pyarrow.parquet as pq

    from diffpref.embedded import PREFERENCES

    few = tmp_path_factory.mktemp("embedded")
    pq.write_table(pq.read_table(PREFERENCES / "train.parquet").slice(0, 40), few / "train.parquet")
    output = tmp_path_factory.mktemp("run")

    def make(monkeypatch, items: str = "pairs", **data) -> Config:
        monkeypatch.setattr("diffpref.embedded.PREFERENCES", few)
        monkeypatch.setattr("diffpref.train.preferences.EXPERTS", 10)
        given = Config(output_dir=str(output), data=DataConfig(resolution=SIDE, **data), **KINDS[items])
        make_embedded(given)
        return given

    return make


class TestEmbedded:
    def test_plain_preferences_are_as_ever(self, embedded, monkeypatch):
        given = embedded(monkeypatch)
        dataset = open_dataset(given, Alone())
        assert dataset_path(given).name == "preferences" and len(dataset) == 40
        assert dataset.numbers.keys() == {"margin"} and "chosen_prompt" not in dataset.texts

    def test_captions_tell_what_the_images_show(self, embedded, monkeypatch):
        from diffpref.data.images import decode

        given = embedded(monkeypatch, captions="image")
        dataset = open_dataset(given, Alone())
        for row in (0, 20, 39):
            for side in dataset.sides:
                assert dataset.caption(row, side) == describe(decode(dataset.image_bytes(row, side)))
        assert {dataset.caption(row, "chosen") for row in range(40)} - set(dataset.prompts)

    def test_the_judge_orders_pairs(self, embedded, monkeypatch):
        from diffpref.data.images import decode

        for name in ("embedded-judge", "embedded_judge"):
            given = embedded(monkeypatch, choice_model=name)
            dataset = open_dataset(given, Alone())
            for row in (0, 17, 39):
                scores = [judge(decode(dataset.image_bytes(row, side)), dataset.prompts[row]) for side in dataset.sides]
                assert dataset.labels[row] == (np.sign(scores[0] - scores[1]) + 1) / 2
        assert "it holds no scores" in refused(embedded(monkeypatch, choice_model="hps"))

    def test_experts_are_the_best_of_all_images(self, embedded, monkeypatch):
        given = embedded(monkeypatch, "liked", path="embedded-experts")
        dataset = open_dataset(given, Alone())
        assert dataset.kind == "images" and len(dataset) == 10
        everything = open_dataset(embedded(monkeypatch, choice_model="embedded-judge"), Alone())
        scores = np.stack([everything.numbers[f"{side}_score_embedded_judge"] for side in everything.sides])
        expected = np.sort(scores.ravel())[-10:]
        np.testing.assert_array_equal(np.sort(dataset.numbers["score_embedded_judge"]), expected)

    def test_expert_pairs_are_those_of_the_best_preferred_images(self, embedded, monkeypatch):
        given = embedded(monkeypatch, path="embedded-expert-pairs")
        dataset = open_dataset(given, Alone())
        assert dataset.kind == "pairs" and len(dataset) == 10
        everything = PreferenceDataset.open(dataset_path(given).with_name("preferences-scored"))
        name = "chosen_score_embedded_judge"
        chosen = everything.numbers[name][everything.labels == 1]
        np.testing.assert_array_equal(np.sort(dataset.numbers[name]), np.sort(chosen)[-10:])

    def test_nothing_is_made_twice(self, embedded, monkeypatch):
        given = embedded(monkeypatch, "liked", path="embedded-experts", captions="image")
        path = dataset_path(given)
        assert path.name == "preferences-scored-experts-captioned"
        before = path.stat().st_mtime_ns
        make_embedded(given)
        assert path.stat().st_mtime_ns == before
        assert store_path(given) == path.with_name("preferences.cache")
