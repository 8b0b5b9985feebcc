"""A killed import goes on, and its output is that of an undisturbed one."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from support.datasets import pickapic_row, pickapic_rows, write_pickapic
from support.killing import contents, kill_when, start

from diffpref.__main__ import main
from diffpref.data import parquet, resuming
from diffpref.data.import_options import ImportOptions
from diffpref.data.importing import import_source
from diffpref.data.sources import pickapic
from diffpref.data.writing import ShardWriter
from diffpref.errors import UserError

SHARES = {"train": 0.7, "test": 0.3}


@pytest.fixture
def source(tmp_path):
    """120 rows in three files: good ones, ties, repeated pairs, broken images, rows never judged."""
    rows = pickapic_rows(90, no_label=6, truncated=2, null_caption=1)
    rows += [pickapic_row(number, label_0=0.5) for number in range(200, 212)]
    rows += [pickapic_row(number) for number in range(9)]
    random.Random(0).shuffle(rows)
    for part in range(3):
        write_pickapic(tmp_path / "in" / f"train-{part:05d}-of-00003.parquet", rows[part * 40 : part * 40 + 40])
    return tmp_path / "in"


def options(**changes) -> ImportOptions:
    return ImportOptions(**{"ties": "random", "dedup": True, "splits": SHARES, "shard_rows": 16, **changes})


def partial_of(output: Path) -> Path:
    (folder,) = output.parent.glob(f".{output.name}.partial-*")
    return folder


class Killed(BaseException):
    """Stands for SIGKILL where nothing after it is to run."""


def cut(monkeypatch, place: int, source: Path, output: Path, **changes) -> None:
    """Begin an import and end it, with nothing tidied up, when the item number `place` of the source is read."""

    def read_from(path, split, start):
        for number, item in enumerate(reading(path, split, start), start):
            if number == place:
                raise Killed
            yield item

    reading = pickapic.read_from
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pickapic, "read_from", read_from)
        patch.setattr(resuming, "_remove", lambda *_: None)
        import_source("pickapic", source, output, options(**changes))


@pytest.mark.parametrize("place", [0, 16, 17, 64, 119])
def test_cut_anywhere_and_run_again_it_is_as_if_undisturbed(source, tmp_path, monkeypatch, place):
    whole = import_source("pickapic", source, tmp_path / "whole", options())
    cut(monkeypatch, place, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = import_source("pickapic", source, tmp_path / "out", options())
    assert again == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_the_source_of_these_tests_has_what_can_go_wrong(source, tmp_path):
    summary = import_source("pickapic", source, tmp_path / "whole", options())
    assert set(summary.dropped) == {"no_label", "image_truncated", "null_caption", "duplicate_pair"}
    assert summary.ties == 12
    assert all(count > 10 for count in summary.splits.values())


def test_cut_twice(source, tmp_path, monkeypatch):
    import_source("pickapic", source, tmp_path / "whole", options())
    cut(monkeypatch, 50, source, tmp_path / "out")
    cut(monkeypatch, 90, source, tmp_path / "out")
    import_source("pickapic", source, tmp_path / "out", options())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_only_what_is_missing_is_read_again(source, tmp_path, monkeypatch):
    cut(monkeypatch, 100, source, tmp_path / "out")
    journal = json.loads((partial_of(tmp_path / "out") / "journal.json").read_text())
    done = journal["place"]["items"]
    assert done >= 80
    assert done % 16 == 0
    read, rows = [], parquet.rows

    def noted(file, columns, start=0):
        for row in rows(file, columns, start):
            read.append(file.name)
            yield row

    monkeypatch.setattr(parquet, "rows", noted)
    import_source("pickapic", source, tmp_path / "out", options())
    assert read == ["train-00002-of-00003.parquet"] * (120 - done)


def test_a_source_that_cannot_skip_resumes_too(source, tmp_path, monkeypatch):
    import_source("pickapic", source, tmp_path / "whole", options())
    cut(monkeypatch, 70, source, tmp_path / "out")
    monkeypatch.delattr(pickapic, "read_from")
    monkeypatch.setattr(pickapic, "read", lambda path, split: iter([*READ(path)]))
    import_source("pickapic", source, tmp_path / "out", options())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def READ(path: Path) -> list:  # noqa: N802
    found = []
    for file in sorted(path.glob("*.parquet")):
        columns = [*pickapic.REQUIRED, *pickapic.OPTIONAL]
        found += [pickapic._read_row(file.name, n, row) for n, row in enumerate(parquet.rows(file, columns))]
    return found


@pytest.mark.parametrize("change", ["options", "input", "split"])
def test_other_work_is_not_mixed_in(source, tmp_path, monkeypatch, capsys, change):
    output = tmp_path / "out"
    cut(monkeypatch, 70, source, output)
    left = partial_of(output)
    changes = {"options": {"ties": "drop"}, "split": {"split": "test", "splits": {}}}.get(change, {})
    if change == "input":
        write_pickapic(source / "train-00000-of-00003.parquet", [pickapic_row(n) for n in range(500, 540)])
    import_source("pickapic", source, tmp_path / "whole", options(**changes))
    capsys.readouterr()
    import_source("pickapic", source, output, options(**changes))
    assert contents(output) == contents(tmp_path / "whole")
    assert f"{left} is left of another unfinished command" in capsys.readouterr().err
    assert left.exists()


def test_an_output_within_the_input_goes_on_too(source, tmp_path, monkeypatch, capsys):
    import_source("pickapic", source, tmp_path / "whole", options())
    cut(monkeypatch, 70, source, source / "out")
    import_source("pickapic", source, source / "out", options())
    assert "left of another" not in capsys.readouterr().err
    assert contents(source / "out") == contents(tmp_path / "whole")


def test_a_finished_shard_that_someone_removed_is_made_again(source, tmp_path, monkeypatch):
    import_source("pickapic", source, tmp_path / "whole", options())
    cut(monkeypatch, 70, source, tmp_path / "out")
    (partial_of(tmp_path / "out") / "data" / "train-00001.parquet").unlink()
    import_source("pickapic", source, tmp_path / "out", options())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_keeps_what_is_finished(source, tmp_path, monkeypatch, capsys):
    import_source("pickapic", source, tmp_path / "whole", options())
    written, write = [], ShardWriter.write

    def full(self, row):
        written.append(row)
        if len(written) > 60:
            raise OSError(28, "No space left on device")
        write(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises(UserError, match=r"cannot write .*out: No space left on device"):
            import_source("pickapic", source, tmp_path / "out", options())
    assert "the same command goes on from it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    import_source("pickapic", source, tmp_path / "out", options())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_too_many_bad_rows_leave_nothing_even_late(tmp_path):
    rows = [pickapic_row(n) for n in range(60)] + pickapic_rows(0, null_caption=30)
    file = write_pickapic(tmp_path / "in" / "pairs.parquet", rows)
    with pytest.raises(UserError, match="rows are bad"):
        import_source("pickapic", file, tmp_path / "out", options())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_process_at_the_same_work_is_refused(source, tmp_path, monkeypatch, capsys):
    cut(monkeypatch, 70, source, tmp_path / "out")
    before = contents(partial_of(tmp_path / "out") / "data")
    lock = resuming._locked(partial_of(tmp_path / "out"), tmp_path / "out")
    with pytest.raises(UserError, match="another process is writing"):
        import_source("pickapic", source, tmp_path / "out", options())
    resuming.os.close(lock)
    assert contents(partial_of(tmp_path / "out") / "data") == before


class TestTheLastRenames:
    """Killed between the former dataset's going and the new one's coming."""

    def killed_at(self, monkeypatch, call: int, source: Path, output: Path) -> None:
        calls, rename = [], Path.rename

        def counted(self, target):
            if {self.name, Path(target).name} & {"data", "former"}:
                calls.append(self)
                if len(calls) == call:
                    raise Killed
            return rename(self, target)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "rename", counted)
            patch.setattr(resuming, "_remove", lambda *_: None)
            import_source("pickapic", source, output, options(overwrite=True))

    @pytest.mark.parametrize("call", [1, 2])
    def test_the_same_command_ends_it(self, source, tmp_path, monkeypatch, call):
        import_source("pickapic", source, tmp_path / "whole", options())
        import_source("pickapic", source / "train-00000-of-00003.parquet", tmp_path / "out", options())
        former = contents(tmp_path / "out")
        self.killed_at(monkeypatch, call, source, tmp_path / "out")
        assert (tmp_path / "out").exists() == (call == 1)
        with pytest.raises(UserError, match="is not empty"):  # and the former dataset is back
            import_source("pickapic", source, tmp_path / "out", options())
        assert contents(tmp_path / "out") == former
        import_source("pickapic", source, tmp_path / "out", options(overwrite=True))
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]

    def test_what_is_left_of_finished_work_goes_with_the_next_start(self, source, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(resuming, "_remove", lambda *_: None)
            import_source("pickapic", source, tmp_path / "out", options())
        assert partial_of(tmp_path / "out").exists()
        import_source("pickapic", source, tmp_path / "out", options())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def command(source: Path, output: Path) -> list[str]:
    given = ["data", "import", "pickapic", str(source), str(output), "--ties", "random", "--dedup"]
    return [*given, "--shard-rows", "16"]


def test_killed_twice_with_sigkill(source, tmp_path):
    assert main(command(source, tmp_path / "whole")) == 0
    output, killed = tmp_path / "out", 0
    for least in (1, 3):
        finished = f".out.partial-*/data/train-{least:05d}.parquet"
        killed += kill_when(start(command(source, output)), lambda at=finished: any(tmp_path.glob(at)))
    assert killed  # on a busy machine the second one may be done before it is seen
    assert start(command(source, output)).wait() == 0
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    rows = pickapic_rows(2800, no_label=60, truncated=20)
    rows += [pickapic_row(number, label_0=0.5) for number in range(3000, 3120)]
    random.Random(1).shuffle(rows)
    for part in range(5):
        write_pickapic(tmp_path / "in" / f"train-{part:05d}-of-00005.parquet", rows[part * 600 : part * 600 + 600])
    assert main(command(tmp_path / "in", tmp_path / "whole")) == 0
    draw, output, kills = random.Random(2), tmp_path / "out", 0
    while kills < 20:
        process, end = start(command(tmp_path / "in", output)), time.monotonic() + draw.uniform(0.3, 2.5)
        kills += kill_when(process, lambda at=end: time.monotonic() > at)
        if process.returncode == 0:  # done before it was killed: compare, and begin anew
            assert contents(output) == contents(tmp_path / "whole")
            shutil.rmtree(output)
    if not output.exists():
        assert start(command(tmp_path / "in", output)).wait() == 0
    assert contents(output) == contents(tmp_path / "whole")
