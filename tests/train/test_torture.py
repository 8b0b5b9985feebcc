"""`make torture` in small: three kills, each of another run."""

import subprocess
import sys

import pytest
from support.killing import ROOT


@pytest.mark.slow
def test_killed_runs_end_as_uncut_ones():
    command = [sys.executable, str(ROOT / "benchmarks" / "torture.py"), "--kills", "3", "--seed", "1"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    last = ended.stdout.splitlines()[-1]
    assert "3 kills" in last and "3 compared after a kill" in last and "; 0 differences" in last
