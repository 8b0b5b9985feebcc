"""The engine: each question is answered once, whoever dies when, and the answers are those of an undisturbed run."""

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from support.datasets import encoded, make_images, write_rows
from support.tiny import make_pairs

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.engine import Answer, Asked, Question, Refusal, Running, Stage, ask, image_questions, ledger_of
from diffpref.data.engine.ledger import Claims, Ledger
from diffpref.data.engine.on_ray import _refuse_small
from diffpref.data.engine.plan import plan_of
from diffpref.errors import UserError

ROOT = Path(__file__).parents[2]
SCORER = ROOT / "tests" / "support" / "brightness.py"


def plain(grey: int) -> bytes:
    return encoded(Image.new("RGB", (8, 8), (grey, grey, grey)))


def _say(file: Path, asked: list[Asked]) -> list:
    """What is asked, in capitals; the questions are noted, by process."""
    with file.open("a") as notes:
        notes.writelines(f"{os.getpid()} {each.text} {each.name}\n" for each in asked)
    time.sleep(0.01)
    return [Refusal("no") if each.text == "no" else None if each.text == "?" else each.text.upper() for each in asked]


def _load(file: Path):
    return partial(_say, file)


def notes(file: Path) -> list[list[str]]:
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def stage(file: Path, unit: int = 4, **identity: str) -> Stage:
    return Stage("shout", {"tool": "shout", **identity}, partial(_load, file), "text", batch=2, unit=unit)


@pytest.fixture
def dataset(tmp_path):
    return PreferenceDataset.open(write_rows(tmp_path / "in", make_images(3)))


@pytest.fixture
def shout(tmp_path, dataset):
    """Ask texts of the stage; what the tool was asked is noted in `asked`."""

    def run(texts: list[str], workers: int = 1, unit: int = 4, **identity: str):
        questions = [Question(text) for text in texts]
        return ask(stage(tmp_path / "asked", unit, **identity), questions, dataset, tmp_path / "l", Running(workers))

    return run


class TestAsking:
    def test_answers_stand_where_their_questions_do_and_equal_ones_are_asked_once(self, shout, tmp_path):
        answers = shout(["b", "a", "b", "no", "?", "c", "a"])
        assert [answers[n].value for n in range(7)] == ["B", "A", "B", None, None, "C", "A"]
        assert (answers[3], answers[4]) == (Answer(None, None, "no"), Answer(None))
        assert [words[1] for words in notes(tmp_path / "asked")] == ["b", "a", "no", "?", "c"]

    def test_what_is_known_is_not_asked_again_in_whatever_order_or_units(self, shout, tmp_path):
        shout(list("abcdef"))
        assert [shout(list("fcxa"))[n].value for n in range(4)] == list("FCXA")
        assert [shout(list("abcdefx"), unit=3)[n].value for n in range(7)] == list("ABCDEFX")
        assert [words[1] for words in notes(tmp_path / "asked")] == list("abcdefx")

    def test_another_tool_is_asked_anew(self, shout, tmp_path):
        shout(["a"])
        shout(["a"], version="2")
        assert len(notes(tmp_path / "asked")) == 2

    def test_a_name_is_part_of_the_question_and_a_place_is_not(self):
        assert Question("a", row=1).key == Question("a", row=2).key
        keys = {Question("a").key, Question("a", name="1").key, Question("a", b"1").key, Question("a1").key}
        assert len(keys) == 4

    def test_workers_share_the_units(self, shout, tmp_path):
        texts = [f"t{n}" for n in range(120)]
        answers = shout(texts, workers=2)
        assert [answers[n].value for n in range(120)] == [text.upper() for text in texts]
        found = notes(tmp_path / "asked")
        assert sorted(words[1] for words in found) == sorted(texts)

    def test_a_damaged_unit_is_made_again(self, shout, tmp_path):
        shout(list("abcdef"))
        unit = sorted((tmp_path / "l").glob("shout-*/*.parquet"))[0]
        content = bytearray(unit.read_bytes())
        for place in range(4, 60):
            content[place] ^= 1
        unit.write_bytes(content)
        assert [shout(list("abcdef"))[n].value for n in range(6)] == list("ABCDEF")
        assert len(notes(tmp_path / "asked")) in (8, 10)  # a unit of 2 or of 4 more

    def test_a_full_disk_is_one_line_and_keeps_what_is_answered(self, shout, tmp_path, monkeypatch):
        written = []

        def full(path: Path) -> None:
            written.append(path)
            if sum(path.suffix == ".partial" for path in written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        with monkeypatch.context() as patch:
            patch.setattr("diffpref.data.engine.ledger.flush", full)
            with pytest.raises(UserError, match=r"^cannot write .*\.parquet: No space left on device"):
                shout([f"t{n}" for n in range(40)])
        assert not list(tmp_path.rglob("*.partial"))
        kept = {file: file.read_bytes() for file in (tmp_path / "l").glob("shout-*/*.parquet")}
        assert len(kept) == 1
        lost = len(notes(tmp_path / "asked")) - sum(pa.parquet.read_table(file).num_rows for file in kept)
        answers = shout([f"t{n}" for n in range(40)])
        assert [answers[n].value for n in range(40)] == [f"T{n}" for n in range(40)]
        assert len(notes(tmp_path / "asked")) == 40 + lost  # of the one unit that found no room
        assert all(file.read_bytes() == content for file, content in kept.items())

    def test_a_ledger_that_cannot_be_written(self, dataset, tmp_path):
        (tmp_path / "l").write_text("a file")
        with pytest.raises(UserError, match="cannot write"):
            ask(stage(tmp_path / "asked"), [Question("a")], dataset, tmp_path / "l", Running())


class TestImages:
    def test_hashes_are_kept_until_a_file_is_written_again(self, tmp_path):
        first = PreferenceDataset.open(write_rows(tmp_path / "in", make_images(3, image=[plain(n) for n in range(3)])))
        ledger = ledger_of(first.path)
        assert ledger == tmp_path / "in.answers"
        before = list(image_questions(first, ledger))
        (kept,) = (ledger / "hashes").glob("*.parquet")
        changed = kept.stat().st_mtime_ns
        assert list(image_questions(first, ledger)) == before and kept.stat().st_mtime_ns == changed
        (tmp_path / "in" / "train-00000.parquet").unlink()
        write_rows(tmp_path / "in", make_images(3, image=[plain(n) for n in (0, 7, 2)]))
        after = list(image_questions(PreferenceDataset.open(tmp_path / "in"), ledger))
        assert [a.image == b.image for a, b in zip(before, after, strict=True)] == [True, False, True]


class TestClaims:
    def hold(self, file: Path, name: str) -> subprocess.Popen:
        """A process that holds a claim until it is killed."""
        code = (
            "import sys, time; from pathlib import Path; from diffpref.data.engine.ledger import Claims\n"
            "with Claims(Path(sys.argv[1])).claim(sys.argv[2]) as mine: print(mine, flush=True); time.sleep(600)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(file), name], stdout=subprocess.PIPE, env=environment(), text=True
        )
        assert process.stdout.readline() == "True\n"
        return process

    def test_a_claim_of_a_killed_process_is_free_at_once(self, tmp_path):
        claims, names = Claims(tmp_path / "claims"), ["ab" * 12, "cd" * 12]
        holder = self.hold(tmp_path / "claims", names[0])
        try:
            with claims.claim(names[0]) as mine, claims.claim(names[1]) as other:
                assert (mine, other) == (False, True)
        finally:
            holder.kill()
            holder.wait()
        with claims.claim(names[0]) as mine:
            assert mine

    def test_a_dead_workers_unit_is_taken_over_and_a_living_ones_waited_for(self, tmp_path, dataset):
        questions = [Question(text) for text in "abcdef"]
        mine = stage(tmp_path / "asked")
        plan, _ = plan_of(questions, 4)
        first = next(plan.units())[0]
        book = Ledger(tmp_path / "l", mine)
        holder = self.hold(book.folder / "claims", first)
        code = "import sys, time, os; time.sleep(1); os.kill(int(sys.argv[1]), 9)"
        killer = subprocess.Popen([sys.executable, "-c", code, str(holder.pid)])
        started = time.monotonic()
        answers = ask(mine, questions, dataset, tmp_path / "l", Running())
        assert time.monotonic() - started > 0.2  # it waited for the holder
        killer.wait(), holder.wait()
        assert [answers[n].value for n in range(6)] == list("ABCDEF")
        assert [words[1] for words in notes(tmp_path / "asked")] == list("efabcd")

    def test_a_system_without_locks_is_told_of(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(37, "No locks available")

        claims = Claims(tmp_path / "claims")
        monkeypatch.setattr(fcntl, "lockf", refuse)
        with pytest.raises(UserError, match=r"cannot be locked \(No locks available\): choose another --ledger"):
            claims.claim("ab" * 12).__enter__()


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def pairs(folder: Path, count: int) -> Path:
    """Pairs of plain images, each of them different."""
    rows = make_pairs(
        count,
        chosen=[plain(n % 128) for n in range(count)],
        rejected=[plain(128 + n % 128) for n in range(count)],
        prompt=[f"prompt-{n}" for n in range(count)],
    )
    return write_rows(folder, rows)


def label(folder: Path, *more: str, launch: tuple[str, ...] = (), **variables: str) -> subprocess.Popen:
    """`data label` of the folder by the scorer of support/brightness.py, in a process group of its own."""
    command = [sys.executable, *launch, "-m", "diffpref", "data", "label", folder / "in", folder / "out"]
    return subprocess.Popen(
        [*map(str, command), "--scorer", str(SCORER), "--rule", "mean", *more],
        env=environment(SCORED=str(folder / "scored"), **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def content(folder: Path) -> dict[str, object]:
    """The rows of a dataset's parquet files and the text of its others, by name; where it was made left out."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.name: pa.parquet.read_table(file).to_pylist()
        if file.suffix == ".parquet"
        else file.read_text().replace(str(folder.parent), "")
        for file in files
    }


def undisturbed(folder: Path, count: int) -> dict[str, object]:
    pairs(folder / "in", count)
    process = label(folder)
    assert process.wait() == 0, process.stderr.read()
    return content(folder / "out")


def test_killed_at_any_time_and_run_again_it_is_as_if_undisturbed(tmp_path):
    wanted = undisturbed(tmp_path / "whole", 200)
    pairs(tmp_path / "cut" / "in", 200)
    process = label(tmp_path / "cut", SCORING_TIME="0.005")
    while process.poll() is None and len(notes(tmp_path / "cut" / "scored")) < 300:  # within the third unit
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "out").exists()
    assert len(list((tmp_path / "cut" / "in.answers").glob("score-*/*.parquet"))) == 2
    assert label(tmp_path / "cut").wait() == 0
    assert content(tmp_path / "cut" / "out") == wanted
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["in", "in.answers", "out", "scored"]
    assert len(notes(tmp_path / "cut" / "scored")) <= 400 + 128  # the unit in work is lost


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
    wanted = undisturbed(tmp_path / "whole", 4000)
    rng, kills, rounds = random.Random(0), 0, 0
    while kills < 20:
        folder = tmp_path / f"round-{rounds}"
        rounds += 1
        pairs(folder / "in", 4000)
        while True:
            process = label(folder, "--workers", "2", SCORING_TIME="0.002")
            try:
                process.wait(rng.uniform(0.5, 6) if kills < 20 else None)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills += 1
        assert process.returncode == 0, process.stderr.read()
        assert content(folder / "out") == wanted
        assert sorted(path.name for path in folder.iterdir()) == ["in", "in.answers", "out", "scored"]
        assert not list((folder / "in.answers").rglob("*.partial"))


def test_ranks_share_the_units_and_the_main_one_writes(tmp_path):
    pytest.importorskip("torch.distributed.run")
    wanted = undisturbed(tmp_path / "whole", 300)
    pairs(tmp_path / "ranks" / "in", 300)
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0")
    process = label(tmp_path / "ranks", launch=launch, SCORING_TIME="0.01")
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out.count("300 pairs of 300") == 1
    assert content(tmp_path / "ranks" / "out") == wanted
    scored = notes(tmp_path / "ranks" / "scored")
    assert len(scored) == 600 and len({words[2] + words[1] for words in scored}) == 600
    assert len({words[0] for words in scored}) == 2


class TestRay:
    def test_without_ray_it_says_so(self, dataset, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(UserError, match=r"needs Ray, which is not installed: pip install 'diffpref\[ray\]'"):
            ask(stage(tmp_path / "asked"), [Question("a")], dataset, tmp_path / "l", Running(engine="ray"))

    def test_a_cluster_that_would_wait_for_ever_is_refused(self):
        _refuse_small({"CPU": 3}, Running(2))
        with pytest.raises(UserError, match=r"2 workers need 3 CPUs .*, and the cluster has 2"):
            _refuse_small({"CPU": 2}, Running(2))
        with pytest.raises(UserError, match="2 workers need 2 GPUs"):
            _refuse_small({"CPU": 8, "GPU": 1}, Running(2, gpus=1))

    @pytest.mark.slow
    def test_two_workers_one_of_them_killed_and_a_second_run_that_does_what_is_missing(self, tmp_path):
        pytest.importorskip("ray")
        wanted = undisturbed(tmp_path / "whole", 600)
        folder = tmp_path / "ray"
        pairs(folder / "in", 600)
        process = label(folder, "--engine", "ray", "--workers", "2", SCORING_TIME="0.02")
        while process.poll() is None and len({words[0] for words in notes(folder / "scored")}) < 2:
            time.sleep(0.05)
        time.sleep(1)
        first = notes(folder / "scored")[0][0]
        os.kill(int(first), signal.SIGKILL)  # an actor, which this test's command started
        _, error = process.communicate()
        assert process.returncode == 0, error
        assert content(folder / "out") == wanted
        scored = notes(folder / "scored")
        assert len({words[0] for words in scored}) == 3  # Ray started another
        assert 1200 <= len(scored) <= 1200 + 128
        assert len({words[2] + words[1] for words in scored}) == 1200
        more = tmp_path / "more"
        pairs(more / "in", 650)
        process = label(more, "--engine", "ray", "--workers", "2", "--ledger", str(folder / "in.answers"))
        _, error = process.communicate()
        assert process.returncode == 0, error
        assert content(more / "out") == undisturbed(tmp_path / "whole-more", 650)
        assert len(notes(more / "scored")) == 100
