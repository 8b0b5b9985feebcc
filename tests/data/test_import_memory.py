"""An import of 50,000 rows in bounded memory: benchmarks/make_pickapic.py makes them."""

import os
import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.datasets import PICKAPIC
from support.killing import ROOT, start

from diffpref.data.import_options import ImportOptions
from diffpref.data.importing import import_source


def make(folder: Path, rows: int, shards: int) -> Path:
    runpy.run_path(str(ROOT / "benchmarks" / "make_pickapic.py"))["make"](folder, rows, shards, side=64, seed=0)
    return folder


def test_the_synthetic_set_has_the_schema_and_imports(tmp_path):
    folder = make(tmp_path / "in", rows=90, shards=2)
    table = pq.read_table(folder / "train-00000-of-00002.parquet")
    assert set(PICKAPIC.names) <= set(table.column_names)
    assert all(table.schema.field(name).type == PICKAPIC.field(name).type for name in PICKAPIC.names)
    assert table["jpg_1"][0].as_py() == table["jpg_0"][1].as_py()  # images come several times
    summary = import_source("pickapic", folder, tmp_path / "out", ImportOptions(dedup=True))
    assert (summary.read, summary.kept, summary.dropped) == (90, 90, {})
    assert 0 < summary.ties < 30


@pytest.mark.slow
def test_fifty_thousand_rows_in_bounded_memory(tmp_path):
    folder = make(tmp_path / "in", rows=50_000, shards=10)
    command = ["data", "import", "pickapic", str(folder), str(tmp_path / "out"), "--dedup"]
    process = start([*command, "--splits", "train=0.9,validation=0.05,test=0.05"])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss < 1.5e6  # kilobytes
    print(f"peak resident memory {usage.ru_maxrss / 1e6:.2f} GB")
