"""Datasets from datasets: what is added is right, what was there is kept, and every row is accounted for."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.datasets import encoded, make_images, truncated_jpeg, write_rows
from support.generated import write_rows as write_metadata
from support.tiny import make_pairs

from diffpref.__main__ import main
from diffpref.data.annotate import pair_with_generated, select_top
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.schema import ImageRow, PairRow
from diffpref.data.scored_pairs import pair_scored
from diffpref.embedded import world
from diffpref.errors import UserError


def plain(grey: int, width: int = 8) -> bytes:
    return encoded(Image.new("RGB", (width, 8), (grey, grey, grey)))


def opened(folder: Path, rows: list) -> PreferenceDataset:
    return PreferenceDataset.open(write_rows(folder, rows))


def read(folder: Path) -> list:
    return list(PreferenceDataset.open(folder).rows())


class TestSelection:
    def test_the_best_of_both_sides_become_single_images(self, tmp_path):
        chosen, rejected = [0.1, 0.9, 0.3, None], [0.8, 0.2, 0.7, 0.85]
        rows = make_pairs(
            4,
            chosen_prompt=["c0", "c1", None, "c3"],
            rejected_id=["i0", "i1", "i2", "i3"],
            rejected_model=["m"] * 4,
            scores=[
                {"chosen_score_x": a, "rejected_score_x": b, "rejected_score_y": 5.0}
                for a, b in zip(chosen, rejected, strict=True)
            ],
        )
        summary = select_top(opened(tmp_path / "in", rows), tmp_path / "out", "x", 3)
        assert read(tmp_path / "out") == [
            ImageRow(
                "pair-0-rejected",
                rows[0].prompt,
                rows[0].rejected,
                image_id="i0",
                image_model="m",
                scores={"score_x": 0.8, "score_y": 5.0},
            ),
            ImageRow("pair-1-chosen", rows[1].prompt, rows[1].chosen, "c1", scores={"score_x": 0.9, "score_y": None}),
            ImageRow(
                "pair-3-rejected",
                rows[3].prompt,
                rows[3].rejected,
                image_id="i3",
                image_model="m",
                scores={"score_x": 0.85, "score_y": 5.0},
            ),
        ]
        assert (summary.read, summary.kept) == (8, 3)
        assert summary.dropped == {"lower score": 4, "without a score": 1}
        assert summary.options == {"scorer": "x", "top": 3, "of": "images"}
        assert summary.outcome == {"lowest_score": 0.8}

    def test_an_image_counts_once_with_a_prompt_and_again_with_another(self, tmp_path):
        same = plain(7)
        content = [same] * 6 + [plain(n) for n in range(4)]
        prompts = ["p", "p", "q", "p", "p", "p", *"abcd"]
        scores = [{"score_x": 9.0 - n} for n in range(10)]
        dataset = opened(tmp_path / "in", make_images(10, image=content, prompt=prompts, scores=scores))
        summary = select_top(dataset, tmp_path / "out", "x", 3)
        assert [row.id for row in read(tmp_path / "out")] == ["image-0", "image-2", "image-6"]
        assert summary.dropped == {"same image and prompt": 4, "lower score": 3}

    def test_of_equal_scores_the_earlier_row_is_taken(self, tmp_path):
        scores = [{"score_x": float(n % 2)} for n in range(60)]  # a sort of few would be stable by itself
        dataset = opened(tmp_path / "in", make_images(60, scores=scores))
        select_top(dataset, tmp_path / "out", "x", 3)
        assert [row.id for row in read(tmp_path / "out")] == ["image-1", "image-3", "image-5"]

    def test_labels_of_single_images_stay(self, tmp_path):
        rows = make_images(3, label=[1.0, None, 0.0], scores=[{"score_x": float(n)} for n in range(3)])
        select_top(opened(tmp_path / "in", rows), tmp_path / "out", "x", 3)
        assert [row.label for row in read(tmp_path / "out")] == [1.0, None, 0.0]

    def test_fewer_than_asked_for_are_told_of(self, tmp_path, capsys):
        dataset = opened(tmp_path / "in", make_images(2, scores=[{"score_x": 1.0}, {"score_x": None}]))
        assert select_top(dataset, tmp_path / "out", "x", 5).kept == 1
        assert "warning: there are only 1 different images with a score" in capsys.readouterr().err

    def test_scores_that_are_not_there(self, tmp_path):
        dataset = opened(tmp_path / "in", make_images(2, scores=[{"score_hps": 1.0}] * 2))
        with pytest.raises(UserError, match=r"no column 'score_hp': did you mean 'score_hps'\?$"):
            select_top(dataset, tmp_path / "out", "hp", 1)
        with pytest.raises(UserError, match=r"it holds no scores; `diffpref data label` writes them$"):
            select_top(opened(tmp_path / "other", make_images(1)), tmp_path / "out", "hp", 1)
        nothing = opened(tmp_path / "null", make_images(1, scores=[{"score_hp": None}]))
        with pytest.raises(UserError, match=r"no row of .* is left: 1 without a score"):
            select_top(nothing, tmp_path / "out", "hp", 1)

    def test_at_most_so_many_of_a_prompt(self, tmp_path):
        prompts = [*"ppppqq", "r"]
        content = [plain(n) for n in (0, 0, 1, 2, 3, 4, 5)]
        scores = [{"score_x": 9.0 - n} for n in range(7)]
        dataset = opened(tmp_path / "in", make_images(7, image=content, prompt=prompts, scores=scores))
        summary = select_top(dataset, tmp_path / "out", "x", 3, per_prompt=2)
        assert [row.id for row in read(tmp_path / "out")] == ["image-0", "image-2", "image-4"]
        assert summary.dropped == {"lower score": 2, "same image and prompt": 1, "enough of its prompt": 1}
        assert summary.options["per_prompt"] == 2

    def test_whole_pairs_by_their_preferred_images(self, tmp_path):
        labels = [1.0, 0.0, 0.5, 0.8, 1.0, 1.0]
        chosen, rejected = [0.5, 0.9, 0.9, 0.7, None, 0.1], [0.9, 0.6, 0.9, 0.9, 0.9, 0.9]
        rows = make_pairs(
            6,
            label=labels,
            scores=[{"chosen_score_x": a, "rejected_score_x": b} for a, b in zip(chosen, rejected, strict=True)],
        )
        summary = select_top(opened(tmp_path / "in", rows), tmp_path / "out", "x", 2, pairs=True)
        assert read(tmp_path / "out") == [rows[1], rows[3]]  # 0.6 of the rejected image, which people prefer; 0.7
        assert (summary.read, summary.kept) == (6, 2)
        assert summary.dropped == {"lower score": 2, "tie": 1, "without a score": 1}
        assert summary.options == {"scorer": "x", "top": 2, "of": "pairs"}
        assert summary.outcome == {"lowest_score": 0.6}

    def test_a_preferred_image_keeps_one_pair(self, tmp_path):
        rows = make_pairs(
            3,
            prompt=["p"] * 3,
            chosen=[plain(1), plain(1), plain(2)],
            scores=[{"chosen_score_x": 3.0 - n, "rejected_score_x": 0.0} for n in range(3)],
        )
        summary = select_top(opened(tmp_path / "in", rows), tmp_path / "out", "x", 2, pairs=True)
        assert [row.id for row in read(tmp_path / "out")] == ["pair-0", "pair-2"]
        assert summary.dropped == {"same image and prompt": 1}

    def test_single_images_have_no_pairs_to_keep(self, tmp_path):
        dataset = opened(tmp_path / "in", make_images(1, scores=[{"score_x": 1.0}]))
        with pytest.raises(UserError, match=r"--pairs: .*in holds single images; leave --pairs out$"):
            select_top(dataset, tmp_path / "out", "x", 1, pairs=True)


class TestScoredPairs:
    def rows(self) -> list:
        scores = [1.0, 5.0, 3.0, 5.0, None, 2.0, 7.0]
        return make_images(
            7,
            prompt=[*"pqppp", "q", "r"],
            image=[plain(n) for n in (0, 1, 2, 3, 4, 5, 6)],
            image_model=["m"] * 7,
            image_prompt=[f"caption {n}" for n in range(7)],
            scores=[{"score_x": score, "score_y": 0.5} for score in scores],
        )

    @pytest.mark.parametrize(
        ("pairing", "margin", "wanted"),
        [
            ("all", 0.0, [(3, 2, 2.0), (3, 0, 4.0), (2, 0, 2.0), (1, 5, 3.0)]),
            ("adjacent", 0.0, [(3, 2, 2.0), (2, 0, 2.0), (1, 5, 3.0)]),
            ("best-worst", 0.0, [(3, 0, 4.0), (1, 5, 3.0)]),
            ("all", 3.0, [(3, 0, 4.0), (1, 5, 3.0)]),
        ],
    )
    def test_who_meets_whom(self, tmp_path, pairing, margin, wanted):
        summary = pair_scored(opened(tmp_path / "in", self.rows()), tmp_path / "out", "x", pairing, margin)
        found = read(tmp_path / "out")
        assert [(row.id, row.margin) for row in found] == [
            (f"image-{better}-image-{worse}", by) for better, worse, by in wanted
        ]
        assert summary.dropped.get("pair closer than min_margin", 0) == (2 if margin else 0)
        assert (summary.read, summary.kept, summary.dropped["image without a pair"]) == (7, len(wanted), 1)
        winner, loser, _ = wanted[0]
        assert found[0] == PairRow(
            id=f"image-{winner}-image-{loser}",
            prompt="p",
            chosen=plain(winner),
            rejected=plain(loser),
            chosen_prompt=f"caption {winner}",
            rejected_prompt=f"caption {loser}",
            margin=found[0].margin,
            chosen_id=f"image-{winner}",
            rejected_id=f"image-{loser}",
            chosen_model="m",
            rejected_model="m",
            scores={
                "chosen_score_x": 5.0,
                "rejected_score_x": 5.0 - found[0].margin,
                "chosen_score_y": 0.5,
                "rejected_score_y": 0.5,
            },
        )

    def test_equal_images_count_once_and_broken_ones_are_named(self, tmp_path):
        content = [plain(0), plain(0), plain(1), *[plain(n) for n in range(2, 38)], truncated_jpeg()]
        rows = make_images(
            40, prompt=["p"] * 3 + ["q"] * 37, image=content, scores=[{"score_x": float(n)} for n in range(40)]
        )
        summary = pair_scored(opened(tmp_path / "in", rows), tmp_path / "out", "x", "best-worst")
        assert [row.id for row in read(tmp_path / "out")] == ["image-2-image-0", "image-38-image-3"]
        assert summary.dropped == {"same image and prompt": 1, "image_truncated": 1}

    def test_what_cannot_be_paired(self, tmp_path):
        with pytest.raises(UserError, match="`data select` makes single images"):
            pair_scored(opened(tmp_path / "pairs", make_pairs(2)), tmp_path / "out", "x", "all")
        with pytest.raises(UserError, match=r"no column 'score_z': did you mean 'score_[xy]'\?"):
            pair_scored(opened(tmp_path / "in", self.rows()), tmp_path / "out", "z", "all")
        with pytest.raises(UserError, match=r"no row of .* is left: 4 pair closer"):
            pair_scored(PreferenceDataset.open(tmp_path / "in"), tmp_path / "out", "x", "all", 9.0)


class TestPairs:
    def drawn(self, folder: Path, *prompts: str) -> list[tuple[str, Path]]:
        folder.mkdir()
        files = [folder / f"{n}.png" for n in range(len(prompts))]
        for n, file in enumerate(files):
            file.write_bytes(plain(100 + n))
        return list(zip(prompts, files, strict=True))

    def test_each_expert_meets_an_image_of_its_prompt(self, tmp_path):
        rows = [
            ImageRow("a", "p", plain(0), "own", image_id="i", image_model="m", weight=2.0, source="s"),
            ImageRow("b", "unknown", plain(1)),
            ImageRow("c", "p", plain(2), label=1.0),
            ImageRow("d", "p", plain(3), label=0.0),
            ImageRow("e", "q", plain(4)),
            ImageRow("f", "p", plain(5)),
        ]
        drawn = self.drawn(tmp_path / "drawn", "q", "p", "q", "p", "nobody's")
        summary = pair_with_generated(opened(tmp_path / "in", rows), drawn, tmp_path / "out")

        def pair(name: str, prompt: str, expert: int, other: int, **more) -> PairRow:
            return PairRow(name, prompt, plain(expert), plain(100 + other), rejected_id=f"{other}.png", **more)

        assert read(tmp_path / "out") == [
            pair("a", "p", 0, 1, chosen_prompt="own", chosen_id="i", chosen_model="m", weight=2.0, source="s"),
            pair("c", "p", 2, 3),
            pair("e", "q", 4, 0),
            pair("f", "p", 5, 1),  # in turn
        ]
        assert summary.dropped == {"no generated image": 1, "without a liked image": 1}
        assert summary.missing == {"expert of a generated image": 2}

    def test_of_pairs_the_likelier_winner_is_the_expert(self, tmp_path):
        rows = [
            PairRow("a", "p", plain(0), plain(1), chosen_prompt="c", rejected_prompt="r"),
            PairRow("b", "p", plain(2), plain(3), label=0.25, chosen_prompt="c", rejected_prompt="r"),
            PairRow("c", "p", plain(4), plain(5), label=0.5),
        ]
        pair_with_generated(opened(tmp_path / "in", rows), self.drawn(tmp_path / "drawn", "p"), tmp_path / "out")
        found = read(tmp_path / "out")
        assert [(row.id, row.chosen, row.chosen_prompt, row.label) for row in found] == [
            ("a", plain(0), "c", 1.0),
            ("b", plain(3), "r", 1.0),
        ]

    def test_no_prompt_in_common(self, tmp_path):
        dataset = opened(tmp_path / "in", make_images(2))
        with pytest.raises(UserError, match=r"^no row of .*in is left: 2 no generated image$"):
            pair_with_generated(dataset, self.drawn(tmp_path / "drawn", "p"), tmp_path / "out")

    def test_broken_images_count(self, tmp_path):
        rows = make_images(40, prompt=["p"] * 39 + ["q"])
        drawn = self.drawn(tmp_path / "drawn", "p", "q")
        drawn[1][1].write_bytes(b"no image")
        summary = pair_with_generated(opened(tmp_path / "in", rows), drawn, tmp_path / "out")
        assert summary.dropped == {"image_not_an_image": 1} and "the generated image" in summary.bad_rows[0].detail


class TestCommands:
    def test_from_pairs_to_experts_to_pairs(self, tmp_path, capsys):
        rng, known = np.random.default_rng(0), world.compositions()
        both = [[encoded(Image.fromarray(world.paint(known[n], rng, c))) for n in range(6)] for c in (0.0, 0.9)]
        rows = make_pairs(6, prompt=[known[n].caption() for n in range(6)], chosen=both[0], rejected=both[1])
        write_rows(tmp_path / "in", rows)

        def run(*arguments: object) -> str:
            assert main(["data", *map(str, arguments)]) == 0
            return capsys.readouterr().out

        assert run("caption", tmp_path / "in", tmp_path / "captions") == f"{tmp_path / 'captions'}: 6 pairs of 6\n"
        run("label", tmp_path / "captions", tmp_path / "scores", "--scorer", "embedded-judge")
        told = json.loads(run("select", tmp_path / "scores", tmp_path / "best", "--top", 3, "--json"))
        assert (told["kept"], told["read"], told["dropped"]) == (3, 12, {"lower score": 9})
        best = read(tmp_path / "best")
        assert all(row.id.endswith("-chosen") and row.image_prompt == row.prompt for row in best)
        drawn = tmp_path / "drawn"
        drawn.mkdir()
        (drawn / "0.png").write_bytes(both[1][0])
        write_metadata(drawn, [{"file_name": "0.png", "prompt": best[0].prompt}])
        assert run("pairs", tmp_path / "best", drawn, tmp_path / "spin").splitlines() == [
            f"{tmp_path / 'spin'}: 1 pairs of 3",
            "  dropped        2  no generated image",
        ]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["caption", "in", "out", "--captioner", "llava"], "unknown captioner 'llava'"),
            (["label", "in", "out", "--scorer", "embeded-judge"], "did you mean 'embedded-judge'?"),
            (["select", "in", "out"], "it holds no scores"),
            (["select", "in", "out", "--top", "0"], "--top: 0 is not above 0"),
            (["pairs", "in", "nowhere", "out"], "no such folder"),
            (["pairs", "in", "out"], "EXPERTS, GENERATED and OUTPUT"),
            (["pairs", "in", "x", "out", "--pairing", "all"], "takes DATASET and OUTPUT, not 3 folders"),
            (["pairs", "in", "out", "--pairing", "all"], "it holds no scores"),
            (["pairs", "in", "out", "--pairing", "best"], "--pairing"),
            (["pairs", "in", "out", "--pairing", "all", "--min-margin", "-1"], "--min-margin: -1.0 is not 0 or above"),
            (["pairs", "in", "x", "out", "--min-margin", "1"], "are of --pairing"),
            (["select", "in", "out", "--per-prompt", "-1"], "--per-prompt: -1 is not 0 or above"),
            (["label", "nowhere", "out"], "does not exist"),
        ],
    )
    def test_bad_input_is_one_line(self, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        write_rows(Path("in"), make_images(2))
        capsys.readouterr()
        assert main(["data", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("diffpref: ") and message in line
        assert not Path("out").exists()
