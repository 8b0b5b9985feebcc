"""Properties of import: any cell, any bytes of an image, any damaged file; nothing ends in a traceback or uncounted."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.datasets import encoded, jpeg, noise, pair_sample, pickapic_row, write_pickapic, write_tar, write_trl
from support.fuzzing import ANYTHING, MANY, QUICK, TEXTS, mutated

from diffpref.data.dataset import PreferenceDataset
from diffpref.data.images import REASONS, BadImage, decode
from diffpref.data.import_options import ImportOptions
from diffpref.data.importing import import_source
from diffpref.errors import UserError

LENIENT = ImportOptions(max_bad_share=1.0, overwrite=True)
SEEDS = [jpeg(0), encoded(noise(1)), encoded(noise(2), "WEBP"), encoded(noise(3), "GIF")]
CELLS: dict[
    str, tuple[pa.DataType, Any]
] = {  # of TRL's form: the columns that a file may have, and what may be in them
    "id": (pa.string(), st.none() | TEXTS),
    "prompt": (pa.string(), st.none() | TEXTS),
    "chosen": (pa.binary(), st.none() | st.binary(max_size=60) | st.sampled_from(SEEDS)),
    "rejected": (pa.binary(), st.none() | st.binary(max_size=60) | st.sampled_from(SEEDS)),
    "label": (pa.float64(), st.none() | st.floats()),
    "weight": (pa.float64(), st.none() | st.floats()),
    "margin": (pa.float64(), st.none() | st.floats()),
    "chosen_prompt": (pa.string(), st.none() | TEXTS),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("properties")


def imports(source: str, file: Path, output: Path, rows: int | None = None) -> bool:
    """Import; whether it went through. What was read is then kept or dropped, and what was kept can be read."""
    try:
        summary = import_source(source, file, output, LENIENT)
    except UserError as error:
        assert "\n" not in str(error)
        return False
    assert summary.kept + sum(summary.dropped.values()) == summary.read
    assert rows is None or summary.read == rows
    dataset = PreferenceDataset.open(output)
    assert len(dataset) == len(list(dataset.rows())) == summary.kept
    return True


def any_rows(place: Path, rows: list[dict[str, Any]]) -> bool:
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, (kind, _) in CELLS.items()})
    pq.write_table(table, place / "rows.parquet")
    return imports("trl", place / "rows.parquet", place / "out", len(rows))


ROWS = st.lists(st.fixed_dictionaries({name: values for name, (_, values) in CELLS.items()}), min_size=1, max_size=6)


@QUICK
@given(ROWS)
def test_any_cells(place, rows):
    any_rows(place, rows)


@pytest.mark.slow
@MANY
@given(ROWS)
def test_any_cells_often(place, rows):
    any_rows(place, rows)


@QUICK
@given(st.lists(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "label"]), ANYTHING), max_size=5))
def test_any_json(place, rows):
    file = place / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    imports("trl", file, place / "out")


def any_image(data: bytes) -> None:
    """An RGB picture within the limit, or the documented refusal."""
    try:
        image = decode(data, max_pixels=1_000_000)
    except BadImage as error:
        assert error.reason in REASONS
    else:
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= 1_000_000


IMAGES = st.binary(max_size=300) | st.builds(
    lambda data, seed: mutated(data, np.random.default_rng(seed)), st.sampled_from(SEEDS), st.integers(0, 2**32)
)


@QUICK
@given(IMAGES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_image(data):
    any_image(data)


@pytest.mark.slow
@MANY
@given(IMAGES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_image_often(data):
    any_image(data)


def containers(place: Path) -> dict[str, tuple[str, bytes]]:
    """Whole files of each form that import reads, by ending: the source and the bytes."""
    pairs = [(f"prompt {n}", jpeg(2 * n), jpeg(2 * n + 1)) for n in range(6)]
    parquet = write_pickapic(place / "whole.parquet", [pickapic_row(n) for n in range(6)]).read_bytes()
    trl = write_trl(place / "trl.parquet", pairs, label=[1.0] * 6).read_bytes()
    tar = write_tar(place / "whole.tar", [m for n in range(6) for m in pair_sample(n, label=1.0)]).read_bytes()
    (place / "a.jpg").write_bytes(jpeg(0))
    (place / "b.jpg").write_bytes(jpeg(1))
    row = {"prompt": "p", "chosen": "a.jpg", "rejected": "b.jpg"}
    lines = "".join(json.dumps(row | {"prompt": f"p {n}"}) + "\n" for n in range(6)).encode()
    return {
        "0.parquet": ("pickapic", parquet),
        "1.parquet": ("trl", trl),
        "2.tar": ("webdataset", tar),
        "3.tar.gz": ("webdataset", gzip.compress(tar, mtime=0)),
        "4.jsonl": ("trl", lines),
        "5.json": ("trl", b"[" + lines.strip().replace(b"\n", b",") + b"]"),
    }


def fuzz_files(place: Path, count: int, seed: int) -> tuple[int, int]:
    """Import so many damaged files, some of whose images alone are damaged; how many went through, how many not."""
    random = np.random.default_rng(seed)
    whole = containers(place)
    good = bad = 0
    for number in range(count):
        ending, (source, data) = list(whole.items())[number % len(whole)]
        if number % 4 == 3:  # cells: sound files of damaged rows
            rows = [spoilt_row(n, random) for n in range(3)]
            file, source = write_pickapic(place / "cells.parquet", rows), "pickapic"
        else:
            file = place / f"mutant{ending}"
            file.write_bytes(mutated(data, random))
        if imports(source, file, place / "out"):
            good += 1
        else:
            bad += 1
    return good, bad


def spoilt_row(number: int, random: np.random.Generator) -> dict[str, Any]:
    row = pickapic_row(number)
    for side in ("jpg_0", "jpg_1"):
        if random.random() < 0.5:
            row[side] = mutated(row[side], random)
    name = str(random.choice(list(row)))
    if random.random() < 0.5:
        values: list[Any] = [None]
        if name.startswith("label"):
            values += [float("nan"), float("inf"), -1.0, 0.5, 2.0]
        elif isinstance(row[name], str):
            values += ["", " ", "\0", "‮א" * 50]
        row[name] = values[int(random.integers(len(values)))]
    return row


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_files_are_imported_or_refused(tmp_path):
    good, bad = fuzz_files(tmp_path, 72, seed=0)
    assert good > 5
    assert bad > 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ten_thousand_mutated_files_and_rows(tmp_path):
    good, bad = fuzz_files(tmp_path, 10_000, seed=1)
    assert good > 1000
    assert bad > 1000


def test_text_that_is_not_utf8_is_refused_by_the_files_name(tmp_path):
    """Found by the fuzz: pyarrow reads such a column, and fails where it becomes text."""
    whole = write_pickapic(tmp_path / "a.parquet", [pickapic_row(0, caption="plain words")], drop=("user_id",))
    table = pq.read_table(whole)
    broken = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff\xfe"], pa.binary()).buffers()[1:]])
    place = table.column_names.index("caption")
    pq.write_table(table.set_column(place, pa.field("caption", pa.string()), broken), whole)
    with pytest.raises(UserError, match=r"a\.parquet is not a readable parquet file: .*utf-8"):
        import_source("pickapic", whole, tmp_path / "out", LENIENT)
