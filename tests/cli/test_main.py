"""The command line as a whole: exit codes, one line for an error, and help that waits for nothing heavy."""

import json
import subprocess
import sys

import pytest

from diffpref import __version__
from diffpref.__main__ import COMMANDS, main
from diffpref.cli import data as data_commands
from diffpref.errors import RunError, UserError, nearest

HEAVY = {"torch", "diffusers", "transformers", "numpy", "pyarrow", "PIL", "accelerate", "peft", "datasets"}


def one_line(captured) -> str:
    """The one line on stderr; nothing may be on stdout."""
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("diffpref: ")
    return lines[0].removeprefix("diffpref: ")


def test_no_help_imports_anything_heavy():
    helps = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["train", "sd15-dpo", "--help"]]
    helps += [["data", name, "--help"] for name in data_commands.COMMANDS]
    program = f"""
import contextlib, io, json, sys
from diffpref.__main__ import main
found = []
for arguments in {helps!r}:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code or 0
    found.append([code, len(shown.getvalue()), sorted(set(sys.modules) & {HEAVY!r})])
print(json.dumps(found))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for arguments, (code, length, heavy) in zip(helps, json.loads(ended.stdout), strict=True):
        assert (code, heavy) == (0, []), arguments
        assert length > (0 if arguments == ["--version"] else 100), arguments
    assert ended.stderr == ""


def test_an_error_in_a_real_process_is_one_line_and_2():
    ended = subprocess.run([sys.executable, "-m", "diffpref", "trian"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "diffpref: unknown command 'trian': did you mean 'train'?\n"


def test_output_cut_short_is_no_traceback():
    command = f"{sys.executable} -m diffpref train sd15-dpo --help | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.stdout.startswith("usage: ") and ended.stderr == ""


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(capsys, flag):
    assert main([flag]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert all(f"\n  {name} " in shown.out for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command; `diffpref --help` lists them"),
        (["generat"], "unknown command 'generat': did you mean 'generate'?"),
        (
            ["--verson"],
            f"unknown command '--verson': known: {', '.join(sorted(COMMANDS))}",
        ),
        (["data", "chek"], "unknown command 'data chek': did you mean 'check'?"),
    ],
)
def test_unknown_commands(capsys, arguments, message):
    assert main(arguments) == 2
    assert one_line(capsys.readouterr()) == message


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("the input"), 2, "the input"),
        (RunError("the run"), 1, "the run"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code, text):
    def fail(arguments):
        raise error

    monkeypatch.setattr("diffpref.cli.generate.main", fail)
    assert main(["generate"]) == code
    assert one_line(capsys.readouterr()) == text


def test_anything_else_is_not_hidden(monkeypatch):
    def fail(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("diffpref.cli.generate.main", fail)
    with pytest.raises(ZeroDivisionError):
        main(["generate"])


def test_nearest_names_one_or_all():
    assert nearest("beto", ["name", "beta"]) == "did you mean 'beta'?"
    assert nearest("xyz", ["name", "beta"]) == "known: beta, name"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory (MemoryError): fewer at once (--batch-size) or a smaller resolution need less"),
        (RuntimeError("CUDA out of memory."), "out of memory (CUDA out of memory.): fewer at once"),
        (
            OSError(28, "No space left on device", "x"),
            "the disk is full ([Errno 28] No space left on device: 'x'): ",
        ),
    ],
)
def test_memory_and_disk_are_one_line_in_every_command(monkeypatch, capsys, error, line):
    def fail(arguments):
        raise error

    monkeypatch.setattr(data_commands, "main", fail)
    assert main(["data", "check", "x"]) == 1
    assert one_line(capsys.readouterr()).startswith(line)


def test_other_errors_stay_what_they_are(monkeypatch):
    monkeypatch.setattr(data_commands, "main", lambda arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["data", "check", "x"])
