"""Datasets that `data check` cannot read: one line that names the place, exit code 2."""

import json

import numpy as np
import pyarrow as pa
import pytest
from support.datasets import jpeg, write_rows

from diffpref.__main__ import main
from diffpref.data.schema import PairRow


def half(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 20] ^= 1
    file.write_bytes(content)


def no_text() -> pa.Array:
    """A column of one row whose bytes are no UTF-8."""
    ends = np.array([0, 2], np.int32).tobytes()
    return pa.StringArray.from_buffers(1, pa.py_buffer(ends), pa.py_buffer(b"\xff\xfe"))


BAD_COLUMNS = {
    "a missing column": ({"prompt": ["p"], "chosen": [jpeg(0)]}, "has no column 'rejected'"),
    "a misspelt column": ({"prmpt": ["p"], "chosen": [jpeg(0)], "rejected": [jpeg(1)]}, "did you mean 'prmpt'?"),
    "no images at all": ({"prompt": ["p"]}, "neither the columns 'chosen' and 'rejected' nor 'image'"),
    "images as text": ({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}, "'chosen' is string, not images"),
    "a label as text": ({"label": ["better"]}, "'label' is string, not double"),
    "a label above 1": ({"label": [1.5]}, "row 0: the label is 1.5, not between 0 and 1"),
    "a label that is no number": ({"label": [float("nan")]}, "row 0: the label is nan"),
    "a negative weight": ({"weight": [-1.0]}, "row 0: the weight is -1"),
    "prompts of lists": ({"prompt": [["a", "b"]]}, "'prompt' is list"),
    "no UTF-8": ({"prompt": no_text()}, "row 0: the prompt is no text in UTF-8"),
    "no rows": ({"prompt": [], "chosen": pa.array([], pa.binary()), "rejected": pa.array([], pa.binary())}, "is empty"),
}


@pytest.mark.parametrize("fault", BAD_COLUMNS)
def test_columns_that_will_not_do_are_one_line(tmp_path, capsys, fault):
    columns, said = BAD_COLUMNS[fault]
    if not {"chosen", "rejected"} & set(columns) and fault != "no images at all":
        columns = {"prompt": ["p"], "chosen": [jpeg(0)], "rejected": [jpeg(1)]} | columns
    pa.parquet.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert_one_line(capsys, tmp_path, said)


DESCRIPTIONS = {
    "another count": ({"kept": 7}, "holds 3 pairs, but its dataset.json tells 7"),
    "another split": ({"split": "test"}, "tells of the split 'test', but the files are of train"),
    "another kind": ({"format": "diffpref-images-1"}, "holds pairs, but its dataset.json tells diffpref-images-1"),
    "another tool's": ({"format": "other"}, "does not describe a dataset of diffpref"),
}


@pytest.mark.parametrize("fault", DESCRIPTIONS)
def test_a_description_that_disagrees_is_one_line(tmp_path, capsys, fault):
    changes, said = DESCRIPTIONS[fault]
    write_rows(tmp_path, [PairRow(str(n), "p", jpeg(2 * n), jpeg(2 * n + 1)) for n in range(3)])
    description = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(description | changes))
    assert_one_line(capsys, tmp_path, said)


@pytest.mark.parametrize(("spoil", "said"), [(half, "is not a readable parquet file"), (flipped, "not a readable")])
def test_damaged_files_are_one_line(tmp_path, capsys, spoil, said):
    write_rows(tmp_path, [PairRow(str(n), "p", jpeg(2 * n), jpeg(2 * n + 1)) for n in range(3)])
    spoil(tmp_path / "train-00000.parquet")
    assert_one_line(capsys, tmp_path, said)


def assert_one_line(capsys, path, said):
    code = main(["data", "check", str(path)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert str(path) in err
