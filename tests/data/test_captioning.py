"""Captions and perturbed texts: the right text on the right side, and every row accounted for."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from PIL import Image
from support.datasets import encoded, make_images, noise, truncated_jpeg
from support.tiny import make_pairs

from diffpref.captioners.base import NoCaption
from diffpref.data.captioning import EMPTY, SAME, TIE, caption_rows, perturb_rows
from diffpref.draws import draw_seed


@dataclass(frozen=True)
class Size:
    """A captioner that tells the image's size and the prompt, and counts; it does not see square images."""

    draws: list[int] = field(default_factory=list)

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], draws: Sequence[int]
    ) -> list[str | NoCaption]:
        self.draws.extend(draws)
        seen = zip(images, prompts, strict=True)
        square = NoCaption("it is square")
        return [square if i.width == i.height else f"{i.width} by {i.height}: {prompt}" for i, prompt in seen]


@dataclass(frozen=True)
class Upper:
    """A perturber that writes in capitals, after the draw; it cannot change "same" and says nothing to "silence"."""

    asked: list[str] = field(default_factory=list)

    def __call__(self, texts: Sequence[str], draws: Sequence[int]) -> list[str]:
        self.asked.extend(texts)
        said = {"same": "same", "silence": " "}
        return [said.get(text, f"{text.upper()} {draw}") for text, draw in zip(texts, draws, strict=True)]


class TestCaptions:
    def test_every_image_of_a_pair_gets_its_own(self):
        rows = make_pairs(
            3,
            chosen=[encoded(noise(n, 10 + n, 5)) for n in range(3)],
            rejected=[encoded(noise(n, 40 + n, 6)) for n in range(3)],
            label=[1.0, 0.25, 0.5],
            chosen_prompt=["former"] * 3,
        )
        size = Size()
        done = caption_rows(rows, size, seed=4)
        assert [each.row for each in done] == [
            replace(row, chosen_prompt=f"{10 + n} by 5: {row.prompt}", rejected_prompt=f"{40 + n} by 6: {row.prompt}")
            for n, row in enumerate(rows)
        ]
        assert all(each.missing == {} for each in done)
        assert size.draws == [
            draw_seed(4, "caption", f"pair-{n}", side) for n in range(3) for side in ("chosen", "rejected")
        ]

    def test_single_images_broken_ones_and_those_without_a_caption(self):
        images = [encoded(noise(0, 9, 5)), truncated_jpeg(), encoded(noise(1, 5, 5)), b"", encoded(noise(2, 7, 5))]
        rows = make_images(5, image=images, image_prompt=["former"] * 5)
        done = caption_rows(rows, Size(), seed=0)
        assert [each.reason for each in done] == ["", "image_truncated", "", "image_empty", ""]
        assert [each.row is None for each in done] == [False, True, False, True, False]
        assert [done[place].row.image_prompt for place in (0, 2, 4)] == [
            f"9 by 5: {rows[0].prompt}",
            None,
            f"7 by 5: {rows[4].prompt}",
        ]
        assert [done[place].missing for place in (0, 2, 4)] == [{}, {"image_prompt": "it is square"}, {}]

    def test_a_pair_is_left_out_for_either_image(self):
        rows = make_pairs(3, chosen=[b"", encoded(noise(0)), encoded(noise(1))])
        rows[1] = replace(rows[1], rejected=b"no image")
        assert [each.reason for each in caption_rows(rows, Size(), seed=0)] == ["image_empty", "image_not_an_image", ""]


class TestPerturbed:
    def test_p_the_worse_image_gets_the_prompt_perturbed(self):
        rows = make_pairs(4, label=[1.0, 0.75, 0.25, 0.0], chosen_prompt=["x"] * 4, rejected_prompt=["y"] * 4)
        done = perturb_rows(rows, Upper(), "p", seed=9)
        other = [f"{row.prompt.upper()} {draw_seed(9, 'perturb', row.id)}" for row in rows]
        assert [each.row for each in done] == [
            replace(rows[0], chosen_prompt=rows[0].prompt, rejected_prompt=other[0]),
            replace(rows[1], chosen_prompt=rows[1].prompt, rejected_prompt=other[1]),
            replace(rows[2], chosen_prompt=other[2], rejected_prompt=rows[2].prompt),
            replace(rows[3], chosen_prompt=other[3], rejected_prompt=rows[3].prompt),
        ]
        assert all(each.missing == {} for each in done)

    def test_h_the_worse_images_caption_is_perturbed(self):
        rows = make_pairs(2, label=[1.0, 0.25], chosen_prompt=["a", "b"], rejected_prompt=["c", "d"])
        found = [each.row for each in perturb_rows(rows, Upper(), "h", seed=9)]
        assert [(row.chosen_prompt, row.rejected_prompt) for row in found] == [
            ("a", f"C {draw_seed(9, 'perturb', 'pair-0')}"),
            (f"B {draw_seed(9, 'perturb', 'pair-1')}", "d"),
        ]

    @pytest.mark.parametrize(("mode", "kept"), [("p", "prompt"), ("h", "own")])
    def test_of_a_tie_nothing_is_perturbed(self, mode, kept):
        (row,) = make_pairs(1, label=[0.5], prompt=["prompt"], chosen_prompt=["own"], rejected_prompt=["own"])
        upper = Upper()
        (done,) = perturb_rows([row], upper, mode, seed=0)
        assert done.row == replace(row, chosen_prompt=kept, rejected_prompt=kept)
        assert list(done.missing) == [TIE] and upper.asked == []

    def test_what_cannot_be_changed_stays_and_is_told(self):
        rows = make_pairs(4, chosen_prompt=["a"] * 4, rejected_prompt=["same", "silence", None, " "])
        upper = Upper()
        done = perturb_rows(rows, upper, "h", seed=0)
        assert [each.row for each in done] == rows
        assert [list(each.missing) for each in done] == [[SAME], [SAME], [EMPTY], [SAME]]
        assert upper.asked == ["same", "silence"]

    def test_rows_do_not_depend_on_one_another(self):
        rows = make_pairs(6, label=list(np.linspace(0, 1, 6)))
        whole = perturb_rows(rows, Upper(), "p", seed=1)
        assert [perturb_rows([row], Upper(), "p", seed=1)[0] for row in rows] == whole
