"""Captions and perturbed texts: the right text on the right side, every row accounted for, nothing asked twice."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from PIL import Image
from support.datasets import encoded, make_images, noise, truncated_jpeg, write_rows, write_trl
from support.tiny import make_pairs

from diffpref.captioners.base import Captioner, NoCaption
from diffpref.data.captioning import EMPTY, SAME, TIE, caption_dataset, perturb_dataset
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.engine import Running
from diffpref.draws import draw_seed
from diffpref.errors import UserError

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


@dataclass(frozen=True)
class Size:
    """A captioner that tells the image's size and the prompt; it does not see square images."""

    groups: list[int] = field(default_factory=list)

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], draws: Sequence[int]
    ) -> list[str | NoCaption]:
        self.groups.append(len(images))
        square = NoCaption("it is square")
        seen = zip(images, prompts, strict=True)
        return [square if i.width == i.height else f"{i.width} by {i.height}: {prompt}" for i, prompt in seen]


SIZE: dict[str, str | float] = {"captioner": "size", "version": "3"}


def plain(grey: int, width: int = 8) -> bytes:
    return encoded(Image.new("RGB", (width, 8), (grey, grey, grey)))


def read(folder: Path) -> list:
    return list(PreferenceDataset.open(folder).rows())


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


def test_an_image_is_captioned_once_whatever_is_cut_off_or_left_out(tmp_path):
    images = [encoded(Image.new("RGB", (8, 8), (n % 256, n // 256, 0))) for n in range(300)]
    rows = make_images(300, image=images)
    data, asked = opened(tmp_path / "in", rows), []
    identity: dict[str, str | float] = {"captioner": "counting", "version": "1"}

    def counting(stop: int) -> Callable:
        def say(images: Sequence[Image.Image], prompts: Sequence[str], draws: Sequence[int]) -> list[str]:
            asked.extend(image.getpixel((0, 0)) for image in images)
            if len(asked) > stop:
                raise KeyboardInterrupt
            return [f"{image.getpixel((0, 0))} of {prompt}" for image, prompt in zip(images, prompts, strict=True)]

        return lambda: say

    def nobody() -> Captioner:
        raise AssertionError("there is nothing to be asked")

    with pytest.raises(KeyboardInterrupt):
        caption_dataset(data, tmp_path / "out", counting(260), identity)
    assert not (tmp_path / "out").exists()
    asked.clear()
    caption_dataset(data, tmp_path / "out", counting(300), identity)
    assert len(asked) == 300 - 2 * 128  # two whole units were there
    whole = list(PreferenceDataset.open(tmp_path / "out").rows())
    assert [row.image_prompt for row in whole] == [f"{(n % 256, n // 256, 0)} of {rows[n].prompt}" for n in range(300)]
    kept = Running(ledger=tmp_path / "in.answers")
    part = opened(tmp_path / "part", rows[::-7])
    caption_dataset(part, tmp_path / "again", nobody, identity, kept)  # nor is the tool loaded
    assert list(PreferenceDataset.open(tmp_path / "again").rows()) == whole[::-7]
    asked.clear()
    caption_dataset(data, tmp_path / "other", counting(300), identity | {"template": "other"})
    assert len(asked) == 300


def test_a_text_does_not_depend_on_the_other_rows(tmp_path):
    rows = make_pairs(9, label=[n / 8 for n in range(9)])
    for name, some in (("all", rows), ("some", rows[::-2])):
        perturb_dataset(opened(tmp_path / name, some), tmp_path / f"{name}-out", Upper, UPPER, "p")
    assert texts(tmp_path / "some-out") == texts(tmp_path / "all-out")[::-2]


def test_many_images_without_a_caption_are_warned_of(tmp_path, capsys):
    identity: dict[str, str | float] = {"captioner": "drawing", "version": "1"}
    caption_dataset(opened(tmp_path / "in", make_images(2)), tmp_path / "out", Drawing, identity)
    assert "diffpref: warning: 2 of 2 rows have an image without a caption; the first: dark" in capsys.readouterr().err


class TestCaptions:
    def test_every_image_of_a_pair_gets_its_own_and_all_else_stays(self, tmp_path):
        rows = make_pairs(
            7,
            chosen=[encoded(noise(n, 10 + n, 5)) for n in range(7)],
            rejected=[encoded(noise(n, 40 + n, 6)) for n in range(7)],
            label=[0.5, *[0.25] * 6],
            source=["s"] * 7,
            scores=[{"chosen_score_x": float(n), "rejected_score_x": None} for n in range(7)],
        )
        size = Size()
        summary = caption_dataset(opened(tmp_path / "in", rows), tmp_path / "out", lambda: size, SIZE)
        assert read(tmp_path / "out") == [
            replace(row, chosen_prompt=f"{10 + n} by 5: {row.prompt}", rejected_prompt=f"{40 + n} by 6: {row.prompt}")
            for n, row in enumerate(rows)
        ]
        assert size.groups == [14]
        assert (summary.read, summary.kept, summary.ties, summary.dropped, summary.missing) == (7, 7, 1, {}, {})

    def test_single_images_and_images_that_cannot_be_captioned(self, tmp_path):
        images = [encoded(noise(0, 9, 5)), encoded(noise(1, 5, 5))]
        rows = make_images(2, image=images, image_prompt=["former", "former"])
        summary = caption_dataset(opened(tmp_path / "in", rows), tmp_path / "out", Size, SIZE)
        assert [row.image_prompt for row in read(tmp_path / "out")] == [f"9 by 5: {rows[0].prompt}", None]
        assert summary.missing == {"image_prompt": 1}

    def test_dataset_json_tells_where_it_comes_from(self, tmp_path):
        caption_dataset(opened(tmp_path / "in", make_images(2)), tmp_path / "out", Size, SIZE)
        caption_dataset(PreferenceDataset.open(tmp_path / "out"), tmp_path / "again", Size, SIZE)
        described = json.loads((tmp_path / "again" / "dataset.json").read_text())
        assert (described["source"], described["format"]) == ("caption", "diffpref-images-1")
        assert described["options"] == {"captioner": "size", "version": "3"}
        assert described["origin"]["source"] == "caption" and described["origin"]["origin"]["source"] == "test"
        assert described["input"] == str(tmp_path / "out")

    def test_broken_rows_are_named_left_out_and_over_five_in_a_hundred_stop(self, tmp_path):
        content = [plain(n) for n in range(40)]
        content[11] = truncated_jpeg()
        content[12] = b""
        summary = caption_dataset(opened(tmp_path / "in", make_images(40, image=content)), tmp_path / "out", Size, SIZE)
        assert [row.id for row in read(tmp_path / "out")] == [f"image-{n}" for n in range(40) if n not in (11, 12)]
        assert summary.dropped == {"image_truncated": 1, "image_empty": 1}
        assert [(bad.file, bad.row, bad.reason) for bad in summary.bad_rows] == [
            ("train-00000.parquet", 11, "image_truncated"),
            ("train-00000.parquet", 12, "image_empty"),
        ]
        content[39] = b"no image"
        dataset = opened(tmp_path / "more", make_images(40, image=content))
        with pytest.raises(
            UserError,
            match=r"^over 5% of 40 rows are bad: 3 images .* such as row 11: image_truncated",
        ):
            caption_dataset(dataset, tmp_path / "stopped", Size, SIZE)
        assert not (tmp_path / "stopped").exists()

    def test_columns_of_no_normal_form_are_told_of(self, tmp_path, capsys):
        write_trl(tmp_path / "in" / "a.parquet", [("p", plain(0, 9), plain(1, 9))], mine=[1], yours=[2])
        caption_dataset(PreferenceDataset.open(tmp_path / "in"), tmp_path / "out", Size, SIZE)
        assert "diffpref: warning: columns of no normal form are left out: mine, yours" in capsys.readouterr().err

    def test_the_output_is_neither_the_input_nor_taken(self, tmp_path):
        dataset = opened(tmp_path / "in", make_images(2))
        with pytest.raises(UserError, match="would replace the input"):
            caption_dataset(dataset, tmp_path / "in", Size, SIZE, overwrite=True)
        opened(tmp_path / "out", make_images(3))
        with pytest.raises(UserError, match="exists and is not empty"):
            caption_dataset(dataset, tmp_path / "out", Size, SIZE)
        caption_dataset(dataset, tmp_path / "out", Size, SIZE, overwrite=True)
        assert len(read(tmp_path / "out")) == 2

    def test_what_a_killed_process_left_is_put_right(self, tmp_path):
        dataset, nobody = opened(tmp_path / "in", make_images(2)), 2**30  # no process has so high a number
        opened(tmp_path / f".out.former-{nobody}", make_images(3))  # killed between two renames of --overwrite
        (tmp_path / f".out.partial-{nobody}").mkdir()
        (tmp_path / f".out.partial-{os.getppid()}").mkdir()
        (tmp_path / ".out.partial-other").mkdir()
        with pytest.raises(UserError, match="exists and is not empty"):
            caption_dataset(dataset, tmp_path / "out", Size, SIZE)
        assert len(read(tmp_path / "out")) == 3
        assert not list(tmp_path.glob(f".out.*-{nobody}"))
        assert (tmp_path / ".out.partial-other").exists() and (tmp_path / f".out.partial-{os.getppid()}").exists()
