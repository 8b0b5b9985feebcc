"""Work by claims on a folder, in several processes or on Ray: whoever dies, it is as if done alone."""

import errno
import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from support.commands import fails
from support.teamwork import die, note, refuse
from support.tiny import SIDE, make_pairs, write_pairs

from diffpref.__main__ import main
from diffpref.data.engine import Running, together
from diffpref.data.shards import Shards
from diffpref.errors import UserError

ROOT = Path(__file__).parents[2]


class TestTogether:
    def test_each_worker_does_it_and_one_is_the_main(self, tmp_path):
        assert together(partial(note, tmp_path), Running(2)) == "done"
        assert sorted(file.read_text() for file in tmp_path.iterdir()) == ["False 1", "True None"]
        assert (tmp_path / str(os.getpid())).read_text() == "True None"

    def test_a_dead_worker_is_told_of(self, tmp_path, capfd):
        assert together(partial(die, tmp_path), Running(2)) == "done"
        assert capfd.readouterr().err == "diffpref: warning: a worker ended with code -9\n"

    def test_an_error_of_the_main_one_ends_all(self, tmp_path):
        with pytest.raises(UserError, match="wrong"):
            together(partial(refuse, tmp_path), Running(2))

    def test_a_rank_above_0_tells_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        assert together(partial(note, tmp_path), Running()) == ""
        assert (tmp_path / str(os.getpid())).read_text() == "False None"

    def test_workers_end_when_the_main_one_is_killed(self, tmp_path):
        code = (
            "import sys; from functools import partial; from pathlib import Path\n"
            "from support.teamwork import note_and_wait; from diffpref.data.engine import Running, together\n"
            "if __name__ == '__main__': together(partial(note_and_wait, Path(sys.argv[1])), Running(2))"
        )
        (tmp_path / "run.py").write_text(code)
        (tmp_path / "pids").mkdir()
        process = subprocess.Popen([sys.executable, tmp_path / "run.py", tmp_path / "pids"], env=environment())
        while len(found := [int(file.name) for file in (tmp_path / "pids").iterdir()]) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        (worker,) = set(found) - {process.pid}
        for _ in range(200):
            try:
                os.kill(worker, 0)
            except ProcessLookupError:
                return
            if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":  # ended, and nobody asked for its code
                return
            time.sleep(0.05)
        pytest.fail("the worker goes on alone")


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def rows(store: Path) -> dict[tuple[str, bytes], bytes]:
    """Every row of a store's shards, by kind with recipe, and by key."""
    found = {}
    for file in store.glob("*.safetensors"):
        kind, recipe, _ = file.name.rsplit("-", 2)
        keys = load_file(file)["keys"]
        for key, row in zip(keys, Shards(store, kind, recipe).rows(keys), strict=True):
            found[f"{kind}-{recipe}", key.tobytes()] = row.numpy().tobytes()
    return found


def generate(pipeline: Path, folder: Path, prompts: Path, *more: str) -> list[str]:
    options = ["--prompts", str(prompts), "--guidance-scale", "2", "--batch-size", "1", *more]
    return ["generate", str(pipeline), str(folder), *options]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue cross\nblack\n")
    return tmp_path / "prompts.txt"


def test_workers_fill_one_store(pipeline, tmp_path, capsys):
    data = write_pairs(tmp_path / "data", make_pairs(12))
    command = ["data", "cache", str(data), "--model", str(pipeline), "--resolution", str(SIDE)]
    told = {}
    for workers in ("1", "2"):
        assert main([*command, "--workers", workers, "--cache", str(tmp_path / workers)]) == 0
        told[workers] = capsys.readouterr().out
    assert told["1"].startswith("24 latents and ") and told["2"].count(" latents and ") == 1
    alone = rows(tmp_path / "1")
    assert len(alone) > 24 and rows(tmp_path / "2") == alone


def test_workers_share_the_images(pipeline, prompts, tmp_path, capsys):
    for workers in ("1", "2"):
        more = ("--workers", workers, "--images-per-prompt", "4", "--steps", "3")
        assert main(generate(pipeline, tmp_path / workers, prompts, *more)) == 0
        assert capsys.readouterr().out == f"12 images of 3 prompts in {tmp_path / workers}\n"
    assert len(contents(tmp_path / "1")) == 13 and contents(tmp_path / "2") == contents(tmp_path / "1")


class TestBadInput:
    @pytest.fixture(params=["generate", "cache"])
    def command(self, request, pipeline, prompts, tmp_path) -> list[str]:
        if request.param == "generate":
            return generate(pipeline, tmp_path / "out", prompts)
        data = write_pairs(tmp_path / "data", make_pairs(2))
        return ["data", "cache", str(data), "--model", str(pipeline), "--cache", str(tmp_path / "out")]

    def test_no_workers(self, command, tmp_path, capsys):
        assert fails(capsys, [*command, "--workers", "0"]) == "--workers: 0 is not above 0"
        assert not (tmp_path / "out").exists()

    def test_without_ray_it_says_so(self, command, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        expected = "--engine ray needs Ray, which is not installed: pip install 'diffpref[ray]'"
        assert fails(capsys, [*command, "--engine", "ray"]) == expected
        assert not (tmp_path / "out").exists()

    def test_ray_under_torchrun(self, command, capsys, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert fails(capsys, [*command, "--engine", "ray"]).startswith("--engine ray has workers of its own")


def holder(file: Path) -> int:
    """The process that holds a lock on the file; 0 if none does."""
    layout = "hhqqi4x"  # struct flock of Linux on 64 bits
    try:
        with file.open("rb+") as opened:
            asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_, process = struct.unpack(layout, fcntl.fcntl(opened, fcntl.F_GETLK, asked))
    except OSError as error:
        assert error.errno == errno.ENOENT
        return 0
    return process if kind != fcntl.F_UNLCK else 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux who holds a lock")
class TestRay:
    def run(self, command: list[str]) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "diffpref", *command, "--engine", "ray", "--workers", "2"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_images_of_two_workers_one_of_them_killed(self, pipeline, prompts, tmp_path):
        pytest.importorskip("ray")
        more = ("--images-per-prompt", "20", "--steps", "100")
        subprocess.run(
            [sys.executable, "-m", "diffpref", *generate(pipeline, tmp_path / "alone", prompts, *more)],
            env=environment(),
            check=True,
        )
        out = tmp_path / "ray"
        process = self.run(generate(pipeline, out, prompts, *more))
        killed = 0
        while process.poll() is None and not killed:
            if len(list(out.glob("*.png"))) > 3 and (killed := holder(out / ".claims.part")):
                os.kill(killed, signal.SIGKILL)  # an actor, which this test's command started
            time.sleep(0.01)
        told, error = process.communicate()
        assert killed and process.returncode == 0, error
        assert told == f"60 images of 3 prompts in {out}\n"
        assert contents(out) == contents(tmp_path / "alone")
        before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}
        lost = ["00000-3.png", "00002-7.png"]
        for name in lost:
            (out / name).unlink()
        process = self.run(generate(pipeline, out, prompts, *more))
        assert process.wait() == 0, process.stderr.read()
        assert contents(out) == contents(tmp_path / "alone")
        after = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}
        assert sorted(name for name in after if after[name] != before[name]) == lost
        process = self.run(generate(pipeline, out, prompts, *more, "--seed", "1"))
        assert process.wait() == 2
        told = [line for line in process.stderr.read().splitlines() if "ray log level" not in line]  # Ray says that
        assert len(told) == 1 and told[0].startswith(f"diffpref: {out} holds images of another model")

    def test_a_store_of_two_workers(self, pipeline, tmp_path):
        pytest.importorskip("ray")
        data = write_pairs(tmp_path / "data", make_pairs(12))
        command = ["data", "cache", str(data), "--model", str(pipeline), "--resolution", str(SIDE), "--cache"]
        assert main([*command, str(tmp_path / "alone")]) == 0
        process = self.run([*command, str(tmp_path / "ray")])
        told, error = process.communicate()
        assert process.returncode == 0, error
        assert told.startswith("24 latents and ") and told.count("\n") == 1
        assert rows(tmp_path / "ray") == rows(tmp_path / "alone")

    def test_workers_that_always_die_are_one_line(self, tmp_path):
        pytest.importorskip("ray")
        (tmp_path / "run.py").write_text(
            "from support.teamwork import always_die; from diffpref.data.engine import Running, together\n"
            "from diffpref.errors import RunError\n"
            "try: together(always_die, Running(2, 'ray'))\n"
            "except RunError as error: print(error)"
        )
        done = subprocess.run([sys.executable, tmp_path / "run.py"], env=environment(), capture_output=True, text=True)
        assert done.stdout.startswith("--engine ray: a worker failed or died too often; "), done.stderr
        assert done.stdout.count("\n") == 1
