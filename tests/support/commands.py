"""Run a command that must fail for what the user got wrong."""

from diffpref.__main__ import main


def fails(capsys, arguments: list[str]) -> str:
    """The message of a command that ends with 2 and exactly one line on stderr, and prints nothing."""
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == ""
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("diffpref: ")
    return lines[0].removeprefix("diffpref: ")
