"""Pick-Double-Caption: captions go with their images, and a perturbed one takes the loser's place."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.datasets import PICKAPIC, jpeg, pickapic_row

from diffpref.__main__ import main
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.schema import Dropped
from diffpref.data.sources import pick_double_caption
from diffpref.errors import UserError


def write(file, *changes: dict, drop: tuple[str, ...] = (), **columns: list):
    table = pa.Table.from_pylist([pickapic_row(number, **each) for number, each in enumerate(changes)], PICKAPIC)
    captions = {f"caption_{side}": [f"of {2 * n + side}" for n in range(len(changes))] for side in (0, 1)} | columns
    for name, values in captions.items():
        table = table.append_column(name, [values])
    pq.write_table(table.drop_columns(list(drop)), file)
    return file


def test_captions_follow_their_images(tmp_path):
    file = write(tmp_path / "a.parquet", {"label_0": 1.0}, {"label_0": 0.0}, {"label_0": 0.5})
    found = [row.record for row in pick_double_caption.read(file, "train")]
    assert [(row.chosen, row.chosen_prompt, row.rejected, row.rejected_prompt, row.label) for row in found] == [
        (jpeg(0), "of 0", jpeg(1), "of 1", 1.0),
        (jpeg(3), "of 3", jpeg(2), "of 2", 1.0),
        (jpeg(4), "of 4", jpeg(5), "of 5", 0.5),
    ]
    assert [(row.id, row.prompt, row.chosen_id, row.rejected_model, row.annotator_id) for row in found] == [
        ("a-0", "caption 0", "a0", "model-b", "7"),
        ("a-1", "caption 1", "b1", "model-a", "7"),
        ("a-2", "caption 2", "a2", "model-b", "7"),
    ]
    assert {row.source for row in found} == {"pick-double-caption"}


def test_a_perturbed_column_is_the_losers_caption(tmp_path):
    file = write(tmp_path / "a.parquet", {"label_0": 1.0}, {"label_0": 0.0}, caption_strong=["twisted 0", "twisted 1"])
    arguments = ["data", "import", "pick-double-caption", str(file), str(tmp_path / "out")]
    assert main([*arguments, "--columns", "rejected_caption=caption_strong"]) == 0
    dataset = PreferenceDataset.open(tmp_path / "out")
    assert dataset.texts["chosen_prompt"] == ["of 0", "of 3"]
    assert dataset.texts["rejected_prompt"] == ["twisted 0", "twisted 1"]


def test_captions_of_other_names(tmp_path):
    file = write(tmp_path / "a.parquet", {"label_0": 0.0}, llava_1=["llava"], drop=("caption_1",))
    (row,) = pick_double_caption.read(file, "train", {"caption_1": "llava_1"})
    assert (row.record.chosen_prompt, row.record.rejected_prompt) == ("llava", "of 0")


def test_without_a_prompt_the_chosen_caption_stands_for_it(tmp_path):
    (row,) = pick_double_caption.read(write(tmp_path / "a.parquet", {"label_0": 0.0}, drop=("caption",)), "train")
    assert row.record.prompt == "of 1"


@pytest.mark.parametrize(
    ("changes", "columns", "reason", "bad"),
    [
        ({"label_0": 0.3}, {}, "label_outside", True),
        ({"label_0": None}, {}, "null_label", True),
        ({"label_1": 1.0}, {}, "labels_disagree", True),
        ({"has_label": False}, {}, "no_label", False),
        ({"caption": None}, {}, "null_caption", True),
        ({}, {"caption_0": pa.array([None], pa.string())}, "null_caption_0", True),
        ({}, {"caption_1": [" "]}, "empty_caption_1", True),
        ({}, {"rejected_caption": [""]}, "empty_rejected_caption", True),
    ],
)
def test_rows_that_are_no_pair(tmp_path, changes, columns, reason, bad):
    (row,) = pick_double_caption.read(write(tmp_path / "a.parquet", changes, **columns), "train")
    assert isinstance(row, Dropped)
    assert (row.file, row.row, row.reason, row.bad) == ("a.parquet", 0, reason, bad)


@pytest.mark.parametrize("column", ["jpg_0", "label_0", "caption_0", "caption_1"])
def test_missing_and_misspelt_columns(tmp_path, column):
    with pytest.raises(UserError, match=f"has no column '{column}'"):
        pick_double_caption.count(write(tmp_path / "a.parquet", {}, drop=(column,)), "train")
    with pytest.raises(UserError, match="has a column 'rejectd_caption': rename it to 'rejected_caption'"):
        pick_double_caption.count(write(tmp_path / "a.parquet", {}, rejectd_caption=["x"]), "train")
