"""Start our command in a process of its own, kill it with SIGKILL, start it again; compare what it leaves."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]


def start(arguments: list[str]) -> subprocess.Popen:
    """`diffpref ARGUMENTS` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "diffpref", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(process: subprocess.Popen, reached) -> bool:
    """Kill the process as soon as `reached()`; False where it ended by itself before."""
    while process.poll() is None:
        if reached():
            process.kill()
            process.wait()
            return True
        time.sleep(0.002)
    return False


def contents(folder: Path) -> dict[str, object]:
    """Every file of a dataset folder by name: the rows of parquet files, the text of others."""
    return {
        str(file.relative_to(folder)): pq.read_table(file).to_pylist()
        if file.suffix == ".parquet"
        else file.read_text()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
