import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw
from support.datasets import (
    bomb,
    encoded,
    jpeg,
    make_images,
    noise,
    pickapic_rows,
    truncated_jpeg,
    write_pickapic,
    write_rows,
    write_trl,
)

from diffpref.__main__ import main
from diffpref.data import check as check_module
from diffpref.data.check import CheckReport, ModelCount, check
from diffpref.data.facts import is_blank
from diffpref.data.findings import KINDS
from diffpref.data.importing import import_source
from diffpref.data.schema import PairRow


def pairs(count: int, start: int = 0) -> list[tuple[str, bytes, bytes]]:
    return [(f"prompt {n}", jpeg(2 * n), jpeg(2 * n + 1)) for n in range(start, start + count)]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and the last line of stderr of `data check`."""
    code = main(["data", "check", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()[-1]


def found(report: CheckReport, split: str = "train") -> dict[str, list[str]]:
    """Ids by kind of finding."""
    return {finding.kind: finding.ids for finding in report.findings if finding.split == split}


def details(report: CheckReport, kind: str) -> list[str]:
    return next(finding.details for finding in report.findings if finding.kind == kind)


def test_an_import_is_fine(tmp_path, capsys):
    import_source("pickapic", write_pickapic(tmp_path / "in.parquet", pickapic_rows(3, tie=1)), tmp_path / "out")
    code, out, _ = run(capsys, tmp_path / "out")
    assert code == 0
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "train: 4 pairs, 0 with an error",
        "labels chosen 3, ties 1",
        "images 8, 8 different; JPEG 8",
        "sizes 24 x 16 8",
        "captions 4 different; the longest has 9 characters",
        "words 1-5 4",
        "models model-a 4 (won 3, lost 0), model-b 4 (won 0, lost 3)",
        "",
        "nothing found",
        "",
        "Prompt lengths in tokens were not measured: --model MODEL does.",
    ]


def test_every_finding_names_its_rows(tmp_path):
    good = pairs(6)
    animation = encoded(noise(0), "GIF", save_all=True, append_images=[noise(1)])
    rows = {
        **{f"r{n}": pair for n, pair in enumerate(good)},
        "same": ("same", jpeg(100), jpeg(100)),
        "again": ("prompt 2", jpeg(4), jpeg(5)),
        "other prompt": ("another prompt", jpeg(4), jpeg(91)),
        "other pair": ("prompt 3", jpeg(6), jpeg(92)),
        "blank": (" ", jpeg(102), jpeg(103)),
        "broken": ("broken", truncated_jpeg(), b""),
        "bomb": ("a bomb", jpeg(104), bomb()),
        "strip": ("a strip", jpeg(105), encoded(noise(1, 66, 2))),
        "leak": ("elsewhere", jpeg(106), jpeg(107)),
        "image leak": ("not elsewhere", jpeg(110), jpeg(111)),
        "black": ("black", encoded(Image.new("RGB", (8, 8))), jpeg(112)),
        "animation": ("animation", jpeg(113), animation),
    }
    ids = list(rows)
    ids[4] = "r0"
    models = ["a"] * len(rows)
    write_trl(
        tmp_path / "train-00000.parquet",
        list(rows.values()),
        id=ids,
        chosen_model=models,
        rejected_model=["a", *["b"] * (len(rows) - 1)],
        lable=[1.0] * len(rows),
        seed=[0] * len(rows),
    )
    test = [("elsewhere", jpeg(108), jpeg(109)), ("new", jpeg(110), jpeg(120)), *pairs(1, 80)]
    write_trl(tmp_path / "test-00000.parquet", test)
    report = check(tmp_path)
    assert found(report) == {
        "image_empty": ["broken"],
        "image_too_large": ["bomb"],
        "image_truncated": ["broken"],
        "image_too_long": ["strip"],
        "same_image": ["same"],
        "duplicate_pair": ["again"],
        "duplicate_id": ["r0"],
        "prompt_in_two_splits": ["leak"],
        "image_in_two_splits": ["image leak"],
        "empty_prompt": ["blank"],
        "blank_image": ["black"],
        "misspelt_column": ["lable"],
        "unknown_column": ["seed"],
        "repeated_image": ["other pair"],
        "image_of_two_prompts": ["other prompt"],
        "same_model": ["r0"],
        "animated_image": ["animation"],
    }
    assert found(report, "test") == {"prompt_in_two_splits": ["0"], "image_in_two_splits": ["1"]}
    assert (report.splits["train"].bad, report.splits["test"].bad) == (4, 0)
    assert details(report, "image_truncated")[0].startswith("chosen: ")
    assert details(report, "image_empty") == ["rejected: no bytes"]
    assert details(report, "duplicate_pair") == ["as r2"]
    assert details(report, "duplicate_id") == ["as row 0"]
    assert details(report, "misspelt_column") == ["did you mean label?"]
    assert details(report, "blank_image") == ["chosen"]
    assert details(report, "animated_image") == ["rejected"]
    order = [list(KINDS).index(finding.kind) for finding in report.findings]
    assert order == sorted(order)  # errors first


def test_the_same_judgement_told_the_other_way_round_is_a_duplicate_and_the_opposite_a_contradiction(tmp_path):
    a, b, c = jpeg(0), jpeg(1), jpeg(2)
    rows = [
        ("p", a, b, 1.0),
        ("p", b, a, 0.0),  # says the same
        ("p", b, a, 0.9),  # says the opposite
        ("p", a, b, 0.5),  # a tie contradicts nobody
        ("p", b, a, 0.5),
        ("p", a, c, 1.0),
        ("q", c, a, 1.0),  # of another prompt
        ("q", a, c, 1.0),
    ]
    write_trl(tmp_path / "a.parquet", [row[:3] for row in rows], label=[row[3] for row in rows])
    report = check(tmp_path)
    assert found(report)["duplicate_pair"] == ["1", "4"]
    assert details(report, "duplicate_pair") == ["as 0", "as 3"]
    assert found(report)["contradicting_label"] == ["0", "1", "2", "6", "7"]
    assert details(report, "contradicting_label") == ["against 2", "against 2", "against 0", "against 7", "against 6"]


def test_a_pair_of_dual_captions_is_no_duplicate_of_another_caption(tmp_path):
    pair = ("prompt", jpeg(0), jpeg(1))
    write_trl(tmp_path / "a.parquet", [pair, pair, pair], chosen_prompt=["x", "y", "x"])
    assert found(check(tmp_path))["duplicate_pair"] == ["2"]


def test_broken_images_are_nobodys_duplicates(tmp_path):
    write_trl(tmp_path / "a.parquet", [("p", b"", b""), ("p", b"", b""), ("q", b"x", b"x")])
    write_trl(tmp_path / "test.parquet", [("r", b"", jpeg(0))])
    report = check(tmp_path)
    assert set(found(report)) == {"image_empty", "image_not_an_image"}
    assert set(found(report, "test")) == {"image_empty"}
    assert (report.splits["train"].distinct, report.splits["test"].distinct) == (0, 1)


def test_numbers_are_those_of_a_count_by_hand(tmp_path):
    labels = [1.0, 0.7, 0.5, 0.0, 0.3, 1.0]
    models = {"chosen_model": ["x", "x", "x", "y", None, "y"], "rejected_model": ["y", "z", "y", "x", "x", "y"]}
    prompts = ["", "one", "a b c d e", "a b c d e f", "w " * 81, "one"]
    images = [
        (encoded(noise(2 * n, 8 + 8 * (n % 2), 8)), encoded(noise(2 * n + 1, 8, 8), "WEBP", lossless=True))
        for n in range(6)
    ]
    rows = [(prompt, *pair) for prompt, pair in zip(prompts, images, strict=True)]
    rows[5] = (rows[5][0], rows[0][1], rows[5][2])
    write_trl(tmp_path / "a.parquet", rows, label=labels, **models)
    split = check(tmp_path).splits["train"]
    assert (split.kind, split.rows, split.bad) == ("pairs", 6, 0)
    assert split.labels == {"chosen": 3, "rejected": 2, "ties": 1, "soft": 2}
    assert (split.images, split.distinct) == (12, 11)
    assert split.formats == {"PNG": 6, "WEBP": 6}
    assert split.sizes == {"8 x 8": 10, "16 x 8": 2}
    assert (split.captions, split.longest) == (5, 162)
    assert split.words == {"0": 1, "1-5": 2, "6-10": 1, "11-20": 0, "21-40": 0, "41-80": 0, "over 80": 1}
    # row by row: x beats y, x beats z, a tie of x and y, x beats y, x beats nobody known, y beats y
    assert split.models == {"x": ModelCount(5, 4, 0), "y": ModelCount(5, 1, 3), "z": ModelCount(1, 0, 1)}


def test_many_sizes_are_told_as_the_most_frequent_and_the_others(tmp_path):
    rows = [("p", encoded(noise(n, n, 9)), encoded(noise(n, n, 9))) for n in range(1, 13)]
    write_trl(tmp_path / "b.parquet", [*rows, rows[7]])
    sizes = check(tmp_path).splits["train"].sizes
    assert next(iter(sizes.items())) == ("8 x 9", 4)
    assert len(sizes) == check_module.MOST_SIZES + 1
    assert sizes["other"] == 2 * (12 - check_module.MOST_SIZES)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 60)])
def test_one_colour_is_blank_and_a_small_thing_on_it_is_not(colour):
    image = Image.new("RGB", (64, 64), colour)
    assert is_blank(image)
    dithered = np.asarray(image).astype(int) + np.random.default_rng(0).integers(-1, 2, (64, 64, 3))
    assert is_blank(Image.fromarray(dithered.clip(0, 255).astype(np.uint8)))
    ImageDraw.Draw(image).ellipse((10, 10, 18, 18), fill=(100, 200, 150))
    assert not is_blank(image)


@pytest.mark.parametrize(("step", "blank"), [(3, True), (4, False), (5, False)])
def test_blank_is_a_deviation_of_less_than_two(step, blank):
    """Two halves a step apart deviate by half of it; one channel of three is enough to show something."""
    values = np.full((8, 8, 3), 100, np.uint8)
    values[:4, :, 1] += step
    assert is_blank(Image.fromarray(values)) == blank == (values.std(axis=(0, 1)).max() < 2)


@pytest.mark.parametrize(("bad", "code"), [(1, 0), (2, 2)])
def test_five_in_a_hundred_at_its_edge(tmp_path, capsys, bad, code):
    broken = [(f"broken {n}", b"no image", jpeg(n)) for n in range(bad)]
    write_trl(tmp_path / "train.parquet", pairs(20 - bad) + broken)
    write_trl(tmp_path / "test.parquet", pairs(20, 100))  # a split's share is its own
    got, out, line = run(capsys, tmp_path)
    assert got == code
    assert "image_not_an_image" in out  # the table is printed either way
    if code:
        assert line == (
            f"diffpref: {tmp_path}: 2 of 20 rows of split 'train' cannot be trained on (0.1, at most 0.05); "
            "most often image_not_an_image (2)"
        )
    assert run(capsys, tmp_path, "--max-bad-share", "0.1")[0] == 0


def test_what_is_odd_but_trains_does_not_fail(tmp_path, capsys):
    pair = pairs(1)[0]
    write_trl(tmp_path / "a.parquet", [pair, pair, (pair[0], pair[2], pair[1]), ("", *pair[1:])], id=["a"] * 4)
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert all(kind in out for kind in ("duplicate_pair", "duplicate_id", "contradicting_label", "empty_prompt"))


def test_json_has_every_id_and_the_table_the_first_three(tmp_path, capsys):
    write_trl(tmp_path / "a.parquet", pairs(1) + [(f"p{n}", jpeg(n), jpeg(n)) for n in range(2, 7)])
    code, out, _ = run(capsys, tmp_path, "--json")
    assert code == 2
    told = json.loads(out)
    assert told["path"] == str(tmp_path)
    assert told["tokenizer"] is None
    assert (told["splits"]["train"]["rows"], told["splits"]["train"]["bad"]) == (6, 5)
    assert told["findings"] == [
        {
            "severity": "error",
            "kind": "same_image",
            "split": "train",
            "ids": ["1", "2", "3", "4", "5"],
            "details": [""] * 5,
        }
    ]
    _, out, _ = run(capsys, tmp_path)
    line = next(line for line in out.splitlines() if "same_image" in line)
    assert line.split(maxsplit=4) == ["error", "train", "same_image", "5", f"{KINDS['same_image'][1]}: 1, 2, 3, ..."]


def test_only_ties_are_warned_of(tmp_path, capsys):
    write_trl(tmp_path / "a.parquet", pairs(2), label=[0.5, 0.5])
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert "only_ties" in out
    assert found(check(tmp_path)) == {"only_ties": ["0", "1"]}


def test_single_images(tmp_path, capsys):
    labels = [1.0, 0.75, 0.5, 0.0, None, None, 1.0, 1.0, 0.0]
    ids = ["a", "b", "c", "d", "e", "f", "a", "h", "i"]
    prompts = ["p", "q", "r", "s", " ", "t", "u", "p", "q"]
    content = [jpeg(n) for n in range(9)]
    content[7], content[5], content[8] = content[0], truncated_jpeg(), content[1]
    write_rows(tmp_path / "data", make_images(9, label=labels, id=ids, prompt=prompts, image=content))
    code, out, _ = run(capsys, tmp_path / "data", "--max-bad-share", "1")
    assert code == 0
    assert "liked 4, disliked 2, ties 1, soft 1, unlabelled 2" in out
    assert found(check(tmp_path / "data")) == {
        "image_truncated": ["f"],
        "contradicting_label": ["b", "i"],
        "duplicate_image": ["h", "i"],
        "duplicate_id": ["a"],
        "empty_prompt": ["e"],
    }


def test_who_was_never_asked_contradicts_nobody(tmp_path):
    images = [jpeg(0)] * 3
    rows = make_images(3, label=[1.0, None, 0.5], prompt=["p"] * 3, image=images)
    assert "contradicting_label" not in found(check(write_rows(tmp_path / "data", rows)))


def test_a_strip_is_too_long_above_thirty_two_times_its_width(tmp_path):
    write_trl(tmp_path / "a.parquet", [(f"p{n}", jpeg(n), encoded(noise(n, 2, n))) for n in (64, 65)], id=["64", "65"])
    assert found(check(tmp_path)) == {"image_too_long": ["65"]}


def test_one_model_alone_is_told_by_its_count(tmp_path):
    for name, others in (("one", ["a"] * 2), ("two", ["a", "b"])):
        write_trl(tmp_path / name / "a.parquet", pairs(2), chosen_model=["a"] * 2, rejected_model=others)
    assert found(check(tmp_path / "one")) == {}
    assert found(check(tmp_path / "two")) == {"same_model": ["0"]}


def test_pairs_and_single_images_in_one_folder(tmp_path, capsys):
    write_trl(tmp_path / "train.parquet", pairs(2))
    write_rows(tmp_path / "other", make_images(3), "test")
    (tmp_path / "other" / "test-00000.parquet").rename(tmp_path / "test.parquet")
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert "test: 3 images" in out
    assert "train: 2 pairs" in out


def test_overlong_prompts_are_those_that_the_tokenizer_cuts(tmp_path, capsys):
    """The embedded text encoder reads 16 tokens: begin, end, and one for each of these words and commas."""
    fits, cut = "red, " * 7, "red, " * 7 + "red"
    write_trl(tmp_path / "a.parquet", [(fits, jpeg(0), jpeg(1)), (cut, jpeg(2), jpeg(3)), ("red", jpeg(4), jpeg(5))])
    code, out, _ = run(capsys, tmp_path, "--model", "embedded", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["tokenizer"] == "embedded"
    assert [(each["kind"], each["ids"]) for each in told["findings"]] == [("overlong_prompt", ["1"])]
    _, out, _ = run(capsys, tmp_path, "--model", "embedded", "--max-tokens", "2", "--json")
    assert json.loads(out)["findings"][0]["ids"] == ["0", "1", "2"]
    _, out, _ = run(capsys, tmp_path, "--model", "embedded", "--max-tokens", "17")
    assert "overlong_prompt" not in out
    assert "not measured" not in out


def test_a_tokenizers_own_folder_will_do(tmp_path, pipeline):
    from diffpref.models.tokenizers import overlong_for

    prompts = ["a", "a " * 200]
    assert overlong_for(str(pipeline / "tokenizer"))(prompts) == overlong_for(str(pipeline))(prompts) == {1}


def test_captions_of_images_are_measured_too(tmp_path):
    write_trl(tmp_path / "a.parquet", pairs(3), rejected_prompt=[None, "long one", "short"])
    report = check(tmp_path, lambda prompts: {n for n, prompt in enumerate(prompts) if "long" in prompt}, "mine")
    assert found(report) == {"overlong_prompt": ["1"]}


def test_strange_captions_and_ids_are_only_text(tmp_path, capsys):
    captions = [None, "", "x" * 1_000_000, "قطة حمراء تجلس على سجادة", "\x1b[31mred\x1b[0m\0", "\u202eabc"]
    rows = [PairRow(f"\x1b[2J{n}", caption or "", jpeg(2 * n), jpeg(2 * n)) for n, caption in enumerate(captions)]
    write_rows(tmp_path / "data", rows)
    code, out, _ = run(capsys, tmp_path / "data", "--max-bad-share", "1")
    assert code == 0
    assert "the longest has 1,000,000 characters" in out
    assert "\x1b" not in out
    assert "\\x1b[2J0" in out
    write_trl(tmp_path / "null" / "a.parquet", [("p", jpeg(0), jpeg(1))] * 2, chosen_prompt=[None, ""])
    assert found(check(tmp_path / "null"))["empty_prompt"] == ["1"]


def test_null_prompts_and_ids(tmp_path):
    write_trl(tmp_path / "a.parquet", [(None, jpeg(0), jpeg(1)), ("p", jpeg(2), jpeg(3))], id=pa.array([None, "x"]))
    assert found(check(tmp_path)) == {"empty_prompt": ["0"]}


def test_what_cannot_be_opened_is_one_line(tmp_path, capsys):
    assert run(capsys, tmp_path / "absent") == (2, "", f"diffpref: {tmp_path / 'absent'} does not exist")
    assert run(capsys, tmp_path) == (2, "", f"diffpref: {tmp_path} holds no parquet files")
    assert main(["data", "check"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-tokens", "77"], "--max-tokens needs --model"),
        (["--max-tokens", "0", "--model", "embedded"], "--max-tokens must be at least 1"),
        (["--max-bad-share", "5"], "must lie between 0 and 1"),
        (["--html", "."], "is a folder"),
        (["--model", "./nowhere"], "--model: ./nowhere is no folder"),
        (["--htm", "x"], "--htm"),
    ],
)
def test_wrong_options_are_refused_before_the_work(tmp_path, capsys, arguments, said, monkeypatch):
    write_trl(tmp_path / "a.parquet", pairs(1))
    monkeypatch.setattr(check_module, "gather", lambda *_: pytest.fail("the images were looked at"))
    code, out, line = run(capsys, tmp_path, *arguments)
    assert (code, out) == (2, "")
    assert said in line


def test_a_folder_without_a_tokenizer_is_told(tmp_path, capsys):
    write_trl(tmp_path / "data" / "a.parquet", pairs(1))
    (tmp_path / "model").mkdir()
    assert "holds no tokenizer" in run(capsys, tmp_path / "data", "--model", tmp_path / "model")[2]


@pytest.mark.parametrize("command", [[], ["import"], ["check"]])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\nfrom diffpref.__main__ import main\n"
        f"try: main(['data', *{command}, '--help'])\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'pyarrow', 'PIL', 'numpy', 'datasets'} & set(sys.modules), sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: diffpref data" in done.stdout
