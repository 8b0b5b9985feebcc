"""A model as judge: what verdicts say, in both orders, and that nothing is asked twice."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.commands import fails
from support.generated import read_rows, write_rows
from support.language import make_blip, make_llava, make_qwen2vl
from support.server import Server, completion, shown

from diffpref.__main__ import main
from diffpref.captioners.base import CaptionOptions, NoCaption, load_captioner
from diffpref.errors import RunError, UserError
from diffpref.evaluate.judging import Answers, Judgement, Words, judge_folders, paired

WHO: dict[str, str | float] = {"judge": "test"}


def folder(place: Path, light: int, prompts: int = 6, per_prompt: int = 2) -> Path:
    """Grey images, each prompt's a little lighter than the last one's."""
    place.mkdir()
    rows = []
    for number in range(prompts):
        for index in range(per_prompt):
            name = f"{number}-{index}.png"
            Image.new("RGB", (16, 16), (light + 2 * number + index,) * 3).save(place / name)
            rows.append({"file_name": name, "prompt": f"prompt {number}", "index": index, "seed": number + index})
    write_rows(place, rows)
    return place


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return folder(tmp_path / "base", 60), folder(tmp_path / "tuned", 160)


class Looks:
    """A judge that is a function of two brightnesses and the prompt; it counts its questions."""

    def __init__(self, says: Callable[[float, float, str], str | NoCaption]) -> None:
        self.says, self.asked = says, 0

    def look(
        self, shown: Sequence[Sequence[Image.Image]], prompts: Sequence[str], draws: Sequence[int]
    ) -> list[str | NoCaption]:
        self.asked += len(shown)
        light = [[float(np.asarray(image).mean()) for image in images] for images in shown]
        return [self.says(first, second, prompt) for (first, second), prompt in zip(light, prompts, strict=True)]


def judged(folders: tuple[Path, Path], says: Callable[[float, float, str], str | NoCaption], **given: Any) -> Judgement:
    return judge_folders(*folders, lambda: Looks(says), WHO, Words(), given.pop("ledger", folders[0] / "x"), **given)


def lighter(first: float, second: float, prompt: str) -> str:
    return "The first." if first > second else "Second!"


def test_a_judge_that_knows_the_truth(folders: tuple[Path, Path], tmp_path: Path):
    result = judged(folders, lighter)
    assert (result.win_rate, result.win_rate_low, result.win_rate_high) == (1.0, 1.0, 1.0)
    assert (result.wins, result.losses, result.ties) == (12, 0, 0)
    assert (result.position_bias, result.first_chosen) == (0.0, 0.5)
    assert (result.prompts, result.pairs, result.asked) == (6, 12, 24)
    assert result.p_value == 2 / 2**6
    other = judged((folders[1], folders[0]), lighter, ledger=tmp_path / "y")
    assert (other.win_rate, other.losses, other.p_value) == (0.0, 12, 2 / 2**6)


@pytest.mark.parametrize(("word", "chosen"), [("first", 1.0), ("second", 0.0)])
def test_a_judge_that_always_says_the_same_place(folders: tuple[Path, Path], word: str, chosen: float):
    result = judged(folders, lambda *_: word)
    assert (result.win_rate, result.ties) == (0.5, 12)
    assert (result.position_bias, result.position_bias_low, result.first_chosen) == (1.0, 1.0, chosen)
    assert result.p_value == 1.0


def test_a_judge_that_finds_all_alike_is_not_biased(folders: tuple[Path, Path]):
    result = judged(folders, lambda *_: "a tie")
    assert (result.win_rate, result.ties, result.position_bias, result.first_chosen) == (0.5, 12, 0.0, None)


def test_counts_by_hand(folders: tuple[Path, Path]):
    """Prompt 0 for b, 1 for a, 2 by place, 3 a tie once, 4 unreadable once, 5 without an answer."""

    def says(first: float, second: float, prompt: str) -> str | NoCaption:
        return {
            "prompt 0": lighter(first, second, prompt),
            "prompt 1": "second" if first > second else "first",
            "prompt 2": "first",
            "prompt 3": "tie" if first > second else "second",
            "prompt 4": "first" if first > second else "I cannot say",
            "prompt 5": NoCaption("refused"),
        }[prompt]

    result = judged(folders, says)
    assert (result.wins, result.losses, result.ties, result.pairs, result.unread) == (2, 2, 4, 8, 4)
    assert (result.win_rate, result.position_bias) == (0.5, 0.5)
    assert result.first_chosen == 8 / 14  # of the verdicts of pairs that count: 2 + 2 + 4 + 0 of 4 + 4 + 4 + 2
    assert result.prompts == 4


def test_nothing_is_asked_twice(folders: tuple[Path, Path], tmp_path: Path):
    judge = Looks(lighter)
    given = (lambda: judge, WHO, Words(), tmp_path / "ledger")
    first = judge_folders(*folders, *given)
    again = judge_folders(*folders, *given)
    assert judge.asked == 24
    assert again.asked == 0
    assert {**first.summary(), "asked": 0} == again.summary()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(folders[1] / "3-1.png")
    assert judge_folders(*folders, *given).asked == 2
    judge_folders(*folders, lambda: judge, {"judge": "other"}, Words(), tmp_path / "ledger")
    assert judge.asked == 24 + 2 + 24


def test_a_run_that_breaks_off_keeps_its_answers(folders: tuple[Path, Path], tmp_path: Path):
    count = 0

    def says(first: float, second: float, prompt: str) -> str:
        nonlocal count
        count += 1
        if count == 11:
            raise RunError("the server is gone")
        return lighter(first, second, prompt)

    with pytest.raises(RunError, match="gone"):
        judged(folders, says, ledger=tmp_path, batch=4)
    assert judged(folders, lighter, ledger=tmp_path, batch=4).asked == 24 - 8
    damaged = next((tmp_path).glob("judge-*/*.parquet"))
    damaged.write_bytes(b"PAR1")
    assert judged(folders, lighter, ledger=tmp_path, batch=4).asked > 0


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("first", "first"),
        ("**Second**.", "second"),
        ("It is a TIE", "tie"),
        ("The second is sharper than the first. Answer: second", "second"),
        ("first or second", None),
        ("firstly", None),
        ("", None),
    ],
)
def test_verdicts_are_read(answer: str, verdict: str | None):
    assert Words().read(answer) == verdict
    assert Words("A", "B", "C").read("[[B]]") == "second"


def test_images_that_cannot_be_decoded_are_left_out_and_named_once(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
):
    (folders[1] / "2-0.png").write_bytes(b"no image")
    with caplog.at_level("WARNING", "diffpref"):
        result = judged(folders, lighter)
    assert (result.broken, result.pairs, result.win_rate) == (1, 11, 1.0)
    assert sum("2-0.png" in record.getMessage() for record in caplog.records) == 1


def test_no_verdict_at_all(folders: tuple[Path, Path]):
    with pytest.raises(RunError, match="no verdict in 12 pairs: 12 without a readable answer"):
        judged(folders, lambda *_: "hm")


def test_folders_that_do_not_pair(folders: tuple[Path, Path]):
    a, b = folders
    rows = read_rows(b)
    write_rows(b, rows[:-1])
    with pytest.raises(UserError, match=r"tuned lacks image 1 of the prompt 'prompt 5', which .*base has \(1 such"):
        paired(a, b)
    with pytest.raises(UserError, match=r"tuned lacks image 1"):
        paired(b, a)
    write_rows(b, [*rows[:-1], rows[-1] | {"seed": 99}])
    with pytest.raises(UserError, match=r"has seed 6 in .* and 99 in"):
        paired(a, b)
    write_rows(b, [*rows, rows[0]])
    with pytest.raises(UserError, match=r"line 13: image 0 of the prompt 'prompt 0' is listed twice"):
        paired(a, b)


def test_answers_of_another_judge_are_not_read(tmp_path: Path):
    Answers(tmp_path, WHO).keep({"a": "first"})
    assert Answers(tmp_path, WHO).known == {"a": "first"}
    assert Answers(tmp_path, {"judge": "other"}).known == {}


@pytest.mark.parametrize("make", [make_llava, make_qwen2vl])
def test_models_of_transformers_are_shown_both_images(make: Callable[[Path], Path], tmp_path: Path):
    options = CaptionOptions("transformers", str(make(tmp_path / "model")), template="{prompt}", max_new_tokens=8)
    model: Any = load_captioner(options)
    light, dark = (Image.new("RGB", (16, 16), (value, 30, 90)) for value in (250, 5))
    orders = [[light, dark], [dark, light], [light, light]]
    found = model.look(orders, ["which"] * 3, [0] * 3)
    assert [model.look([each], ["which"], [0])[0] for each in orders] == found
    assert len(set(found)) > 1


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def seen(number: int, body: dict) -> tuple[int, dict, bytes]:
    first, second = (np.asarray(image).mean() for image in shown(body))
    return 200, {}, completion("A" if first > second else "B")


def test_the_command_with_an_endpoint_and_a_file(
    folders: tuple[Path, Path], tmp_path: Path, server: Server, capsys: pytest.CaptureFixture
):
    server.reply = seen
    config = tmp_path / "judge.yaml"
    config.write_text(
        f"judge: endpoint\nurl: {server.url}\nmodel: eyes\nfirst: A\nsecond: B\ntie: C\n"
        "template: 'Which shows {prompt}? A, B or C?'\n"
    )
    arguments = ["judge", *map(str, folders), "--config", str(config)]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["win_rate"], result["position_bias"], result["asked"]) == (1.0, 0.0, 24)
    assert result["judge"]["model"] == "eyes"
    text = server.seen[0][2]["messages"][0]["content"][-1]["text"]
    assert text == "Which shows prompt 0? A, B or C?"
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "win rate       100.0% of tuned over base" in told
    assert "0 asked now" in told
    assert len(server.seen) == 24
    assert (tmp_path / "tuned.verdicts").is_dir()
    server.reply = lambda number, body: (200, {}, completion("A"))
    assert main([*arguments, "--template", "Other {prompt}?", "--json", "--ledger", str(tmp_path / "l")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["win_rate"], result["position_bias"], result["first_chosen"]) == (0.5, 1.0, 1.0)


def test_what_the_command_refuses(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    given = ["judge", *map(str, folders)]
    assert "needs a model" in fails(capsys, given)
    assert "no such option" in fails(capsys, [*given, "--model", "a/b", "--url", "http://x/v1"])
    assert "three words" in fails(capsys, [*given, "--model", "a/b", "--tie", "First"])
    assert "unknown field {image}" in fails(capsys, [*given, "--model", str(tmp_path), "--template", "{image}"])
    (tmp_path / "judge.yaml").write_text("modle: x\n")
    assert "did you mean 'model'?" in fails(capsys, [*given, "--config", str(tmp_path / "judge.yaml")])
    assert "BASE" in fails(capsys, ["judge"])
    model = make_blip(tmp_path / "blip")
    assert "no chat template" in fails(capsys, [*given, "--model", str(model)])
