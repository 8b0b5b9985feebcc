"""Captions and perturbed texts: the right text on the right side, every row accounted for, nothing asked twice."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.commands import fails
from support.datasets import make_images, write_rows
from support.runs import metrics
from support.tiny import make_pairs

from diffpref.__main__ import main
from diffpref.captioners.base import NoCaption
from diffpref.data.captioning import EMPTY, SAME, TIE, caption_dataset, perturb_dataset
from diffpref.data.dataset import PreferenceDataset
from diffpref.draws import draw_seed
from diffpref.embedded import MODEL

UPPER: dict[str, str | float] = {"perturber": "upper", "version": "1", "seed": 4}


@dataclass(frozen=True)
class Upper:
    """A perturber that writes in capitals, after the draw; it cannot change "same" and says nothing to "silence"."""

    asked: list[str] = field(default_factory=list)

    def __call__(self, texts: Sequence[str], draws: Sequence[int]) -> list[str]:
        self.asked.extend(texts)
        said = {"same": "same", "silence": " "}
        return [said.get(text, f"{text.upper()} {draw}") for text, draw in zip(texts, draws, strict=True)]


@dataclass(frozen=True)
class Drawing:
    """A captioner that tells its draws, and cannot see."""

    draws: list[int] = field(default_factory=list)

    def __call__(self, images: Sequence[object], prompts: Sequence[str], draws: Sequence[int]) -> list[NoCaption]:
        self.draws.extend(draws)
        return [NoCaption("dark") for _ in images]


def opened(folder: Path, rows: list) -> PreferenceDataset:
    return PreferenceDataset.open(write_rows(folder, rows))


def perturbed(text: str, number: int, seed: int = 4) -> str:
    return f"{text.upper()} {draw_seed(seed, 'perturb', f'id-{number}')}"


def texts(folder: Path) -> list[tuple[str | None, str | None]]:
    return [(row.chosen_prompt, row.rejected_prompt) for row in PreferenceDataset.open(folder).rows()]


@pytest.fixture
def five() -> list:
    """Pairs won, lost, tied, with a text that cannot be changed, and with one that becomes nothing."""
    return make_pairs(
        5,
        id=[f"id-{n}" for n in range(5)],
        prompt=["a cat", "a dog", "a cow", "same", "silence"],
        label=[1.0, 0.2, 0.5, 0.7, 1.0],
        chosen_prompt=["one", "two", "three", None, "five"],
        rejected_prompt=["six", "seven", "eight", None, "nine"],
    )


def test_mode_p_perturbs_the_prompt_of_the_worse_image(tmp_path, five):
    upper = Upper()
    summary = perturb_dataset(opened(tmp_path / "in", five), tmp_path / "out", lambda: upper, UPPER, "p")
    assert texts(tmp_path / "out") == [
        ("a cat", perturbed("a cat", 0)),
        (perturbed("a dog", 1), "a dog"),  # its label is below a half, so the one that stands as chosen is worse
        ("a cow", "a cow"),
        ("same", "same"),
        ("silence", "silence"),
    ]
    assert upper.asked == ["a cat", "a dog", "same", "silence"]
    assert summary is not None and summary.missing == {TIE: 1, SAME: 2}
    assert summary.options == {**UPPER, "mode": "p"} and summary.kept == 5


def test_mode_h_perturbs_the_caption_of_the_worse_image(tmp_path, five):
    upper = Upper()
    summary = perturb_dataset(opened(tmp_path / "in", five), tmp_path / "out", lambda: upper, UPPER, "h")
    assert texts(tmp_path / "out") == [
        ("one", perturbed("six", 0)),
        (perturbed("two", 1), "seven"),
        ("three", "eight"),
        (None, None),
        ("five", perturbed("nine", 4)),
    ]
    assert upper.asked == ["six", "two", "nine"]
    assert summary is not None and summary.missing == {TIE: 1, EMPTY: 1}


def test_nothing_is_perturbed_twice(tmp_path, five):
    first, second, other = Upper(), Upper(), Upper()
    data = opened(tmp_path / "in", five)
    perturb_dataset(data, tmp_path / "a", lambda: first, UPPER, "p")
    perturb_dataset(data, tmp_path / "b", lambda: second, UPPER, "p")
    assert len(first.asked) == 4 and second.asked == [] and texts(tmp_path / "a") == texts(tmp_path / "b")
    perturb_dataset(data, tmp_path / "c", lambda: other, {**UPPER, "seed": 5}, "p")
    assert len(other.asked) == 4 and texts(tmp_path / "c")[0] == ("a cat", perturbed("a cat", 0, seed=5))


def test_captions_are_drawn_by_seed_and_prompt_and_may_lack(tmp_path, five):
    drawing = Drawing()
    identity: dict[str, str | float] = {"captioner": "drawing", "version": "1", "seed": 9}
    summary = caption_dataset(opened(tmp_path / "in", five[:2]), tmp_path / "out", lambda: drawing, identity)
    assert drawing.draws == [draw_seed(9, "caption", text) for text in ("a cat", "a cat", "a dog", "a dog")]
    assert summary is not None and summary.missing == {"chosen_prompt": 2, "rejected_prompt": 2}


class TestCommand:
    def test_modes_p_and_h_train(self, tmp_path):
        colours, shapes = ("red", "blue", "green"), ("circle", "square", "cross")
        prompts = [f"a small {colours[n % 3]} {shapes[n % 2]}" for n in range(8)]
        write_rows(tmp_path / "in", make_pairs(8, prompt=prompts))
        given = {name: str(tmp_path / name) for name in ("in", "c", "p", "h")}
        assert main(["data", "caption", given["in"], given["c"]]) == 0
        assert main(["data", "perturb", given["in"], given["p"], "--perturber", "rules", "--level", "strong"]) == 0
        assert all(
            chosen == p != rejected for (chosen, rejected), p in zip(texts(tmp_path / "p"), prompts, strict=True)
        )
        assert main(["data", "perturb", given["c"], given["h"], "--mode", "h"]) == 0
        before, after = texts(tmp_path / "c"), texts(tmp_path / "h")
        assert [one[0] for one in before] == [one[0] for one in after] and before != after
        for name in ("p", "h"):
            run = str(tmp_path / f"run-{name}")
            small = ["--train.max-steps", "2", "--train.batch-size", "2", "--validation.images", "1"]
            how = ["--model.pretrained", str(MODEL), "--data.path", given[name], "--data.holdout", "0"]
            assert main(["train", "embedded-dcpo", "--output-dir", run, *how, *small]) == 0
            assert len(metrics(Path(run))) == 2

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["perturb", "pairs", "out", "--perturber", "rule"], "unknown perturber 'rule': did you mean 'rules'"),
            (["perturb", "pairs", "out", "--mode", "h"], "--mode h: "),
            (["perturb", "images", "out"], "holds single images"),
            (["perturb", "pairs", "out", "--template", "{prompt} x"], "--template: the perturber 'rules' has no"),
            (["caption", "pairs", "out", "--captioner", "llava"], "unknown captioner 'llava'"),
            (["caption", "pairs", "out", "--workers", "0"], "--workers: 0 is not above 0"),
        ],
    )
    def test_what_cannot_be_is_refused(self, tmp_path, monkeypatch, capsys, options, expected):
        monkeypatch.chdir(tmp_path)
        write_rows(tmp_path / "pairs", make_pairs(2))
        write_rows(tmp_path / "images", make_images(2))
        assert expected in fails(capsys, ["data", *options])
        assert not (tmp_path / "out").exists()
