"""`diffpref score` and `diffpref compare` from end to end, with their exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.generated import make_folder, read_rows, write_rows

from diffpref.__main__ import main


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    base = make_folder(tmp_path / "base", clutter=0.8, prompts=12)
    tuned = make_folder(tmp_path / "tuned", clutter=0.1, prompts=12)
    return str(base), str(tuned)


def test_score_prints_a_table(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    assert main(["score", *folders]) == 0
    printed = capsys.readouterr()
    header, base, tuned = (line.split() for line in printed.out.splitlines())
    assert header == ["folder", "scorer", "mean", "error", "images", "prompts", "missing"]
    assert (base[0], tuned[0], tuned[4:]) == (*folders, ["12", "12", "0"])
    assert float(base[2]) < float(tuned[2]) and 0 < float(tuned[3]) < 1
    assert "score-embedded-judge: 12/12" in printed.err


def test_score_as_json(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    assert main(["score", *folders, "--scorer", "embedded-judge", "--json", "--batch-size", "5"]) == 0
    base, tuned = json.loads(capsys.readouterr().out)
    assert base["folder"] == folders[0]
    assert base["mean"] < tuned["mean"] <= 1
    assert (base["images"], base["prompts"], base["scorer"]) == (12, 12, "embedded-judge")
    assert Path(tuned["file"]).is_file()


def test_compare_scores_what_lacks_scores_and_says_so(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    assert main(["score", folders[0]]) == 0
    capsys.readouterr()
    assert main(["compare", *folders]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("scoring it now") == 1
    assert f"{folders[1]} has no current scores" in printed.err
    assert printed.out.startswith("win rate ")
    assert "95% interval" in printed.out


def test_compare_as_json_with_a_page(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "new" / "page.html"
    assert main(["compare", *folders, "--json", "--output", str(page)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0.5 < result["win_rate_low"] <= result["win_rate"] <= result["win_rate_high"] <= 1
    assert result["wins"] + result["losses"] + result["ties"] == result["images"] == 12
    assert result["mean_b"] > result["mean_a"]
    assert result["page"] == str(page)
    assert "pairs" not in result
    text = page.read_text()
    assert "tuned against base" in text
    assert f"diffpref compare {folders[0]} {folders[1]}" in text
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score"], "at least one folder"),
        (["score", "{base}", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["score", "{base}", "--scorer", "embeded-judge"], "did you mean 'embedded-judge'"),
        (["score", "nowhere"], "no such folder: nowhere"),
        (["compare", "{base}"], "at least one other"),
        (["compare", "{base}", "nowhere"], "no such folder: nowhere"),
        (["compare", "{base}", "{tuned}", "--output", "{base}/metadata.jsonl/x.html"], "cannot write"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(
    folders: tuple[str, str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    filled = [argument.format(base=folders[0], tuned=folders[1]) for argument in arguments]
    assert main(filled) == 2
    printed = capsys.readouterr()
    said = [line for line in printed.err.splitlines() if line.startswith("diffpref: ")]
    assert len(said) == 1
    assert message in said[0]
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_other_seeds_are_refused(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    rows = read_rows(Path(folders[1]))
    write_rows(Path(folders[1]), [{**row, "seed": row["seed"] + 1} for row in rows])
    assert main(["compare", *folders]) == 2
    assert "do not pair" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["score", "compare"])
def test_help_imports_nothing_heavy(command: str):
    program = (
        "import sys\nfrom diffpref.__main__ import main\n"
        f"try: main([{command!r}, '--help'])\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'PIL', 'pyarrow', 'diffusers'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--scorer" in done.stdout
