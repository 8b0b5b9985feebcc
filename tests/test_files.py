"""A result is written whole or not at all; names from strangers stay in their folder."""

from pathlib import Path

import pytest

from diffpref.errors import UserError
from diffpref.files import stays_inside, write_whole


def test_a_file_is_written_into_a_new_folder(tmp_path: Path):
    write_whole(tmp_path / "new" / "a.txt", b"one")
    write_whole(tmp_path / "new" / "a.txt", b"two")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"two"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.txt"
    file.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: Permission denied"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_where_a_folder_should_be(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"):
        write_whole(tmp_path / "a" / "b.txt", b"new")


@pytest.mark.parametrize("name", ["a.png", "a/b.png", "./a.png", "..a/b..png", "a b.png", "שלום.png", "a:b.png"])
def test_names_that_stay_inside(name):
    assert stays_inside(name)


@pytest.mark.parametrize("name", ["/a.png", "../a.png", "a/../../b.png", "a/..", "..", "a\\b.png", "a\0.png", "//a"])
def test_names_that_reach_out(name):
    assert not stays_inside(name)
