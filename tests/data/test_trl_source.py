"""TRL-style sets: rows kept as they are, and every fault by its reason."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import fails
from support.datasets import jpeg, truncated_jpeg, write_trl

from diffpref.__main__ import main
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.importing import ImportOptions, import_source
from diffpref.data.schema import PairRow
from diffpref.errors import UserError

LONG = "אבג דהו " * 12_500


def pairs(count: int) -> list[tuple[str, bytes, bytes]]:
    return [(f"prompt {number}", jpeg(2 * number), jpeg(2 * number + 1)) for number in range(count)]


def imported(path, output, **options) -> list:
    import_source("trl", path, output, ImportOptions(**options))
    return list(PreferenceDataset.open(output).rows())


def test_three_columns_are_enough(tmp_path):
    write_trl(tmp_path / "in" / "train-00000-of-00001.parquet", pairs(3))
    assert imported(tmp_path / "in", tmp_path / "out") == [
        PairRow(
            f"train-00000-of-00001-{number}", f"prompt {number}", jpeg(2 * number), jpeg(2 * number + 1), source="trl"
        )
        for number in range(3)
    ]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_may_be_raw_bytes(tmp_path, kind):
    table = pa.table(
        {
            "prompt": pa.array(["p"], pa.large_string()),
            "chosen": pa.array([jpeg(0)], kind),
            "rejected": pa.array([jpeg(1)], kind),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert imported(tmp_path / "a.parquet", tmp_path / "out") == [PairRow("a-0", "p", jpeg(0), jpeg(1), source="trl")]


def test_columns_of_the_normal_form_are_taken(tmp_path, capsys):
    columns = {
        "id": [7],
        "label": [0.3],
        "weight": [2],
        "margin": [-1.5],
        "chosen_prompt": ["of it"],
        "rejected_model": ["m"],
        "chosen_score_hps": [0.25],
        "rejected_score_hps": pa.array([None], pa.float64()),
        "quality": ["left out"],
    }
    write_trl(tmp_path / "a.parquet", pairs(1), **columns)
    assert imported(tmp_path / "a.parquet", tmp_path / "out") == [
        PairRow(
            "7",
            "prompt 0",
            jpeg(0),
            jpeg(1),
            chosen_prompt="of it",
            label=0.3,
            weight=2.0,
            margin=-1.5,
            rejected_model="m",
            source="trl",
            scores={"chosen_score_hps": 0.25, "rejected_score_hps": None},
        )
    ]
    assert "warning: columns that are left out: quality\n" in capsys.readouterr().err


def test_columns_may_have_other_names(tmp_path):
    file = write_trl(tmp_path / "a.parquet", [("no", jpeg(0), jpeg(1))], simplified=["yes"])
    table = pq.read_table(file).rename_columns(["prompt", "better", "rejected", "simplified"])
    pq.write_table(table, file)
    arguments = [
        "data",
        "import",
        "trl",
        str(file),
        str(tmp_path / "out"),
        "--columns",
        "chosen=better",
        "prompt=simplified",
    ]
    assert main(arguments) == 0
    dataset = PreferenceDataset.open(tmp_path / "out")
    assert dataset.prompts == ["yes"]
    assert dataset.image_bytes(0, "chosen") == jpeg(0)
    assert '"columns": "chosen=better prompt=simplified"' in (tmp_path / "out" / "dataset.json").read_text()


def test_a_column_that_stands_in_for_another_no_longer_stands_for_itself(tmp_path):
    file = write_trl(tmp_path / "a.parquet", pairs(1), label=["a text"], chosen_prompt=["of it"])
    turned = {"prompt": "label", "chosen": "rejected", "rejected": "chosen"}
    (row,) = imported(file, tmp_path / "turned", columns=turned)
    assert (row.chosen, row.rejected) == (jpeg(1), jpeg(0))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["chosen"], "--columns: 'chosen' is not NAME=COLUMN"),
        (["chosen=a", "chosen=b"], "--columns: chosen is named twice"),
        (["choosen=a"], "there is no column 'choosen' to name another for: did you mean 'chosen'?"),
        (["prompt=promt"], "has no column 'promt' (did you mean 'prompt'?)"),
    ],
)
def test_wrong_names_of_columns(tmp_path, capsys, columns, message):
    file = write_trl(tmp_path / "a.parquet", pairs(1))
    arguments = ["data", "import", "trl", str(file), str(tmp_path / "out"), "--columns", *columns]
    assert fails(capsys, arguments).endswith(message)
    assert not (tmp_path / "out").exists()


def test_sources_without_columns_name_none(tmp_path):
    with pytest.raises(UserError, match="the source dro has no columns that could be named"):
        import_source("dro", tmp_path, tmp_path / "out", ImportOptions(columns={"a": "b"}))


def test_every_fault_is_counted(tmp_path):
    rows = pairs(60)
    rows[1] = (None, *rows[1][1:])
    rows[2] = (" \n", *rows[2][1:])
    rows[3] = (LONG, *rows[3][1:])
    rows[4] = ("p", b"", jpeg(0))
    rows[5] = ("p", jpeg(0), truncated_jpeg())
    labels, weights = [None] * 60, [1.0] * 60
    labels[6], labels[7], labels[8], labels[9] = 1.5, -0.1, float("nan"), 0.5
    weights[10], weights[11] = -1.0, float("inf")
    columns = {"label": pa.array(labels, pa.float64()), "weight": weights, "margin": [0.0] * 59 + [float("inf")]}
    summary = import_source(
        "trl", write_trl(tmp_path / "a.parquet", rows, **columns), tmp_path / "out", ImportOptions(max_bad_share=0.2)
    )
    assert summary.dropped == {
        "label_outside": 2,
        "weight_outside": 2,
        "null_prompt": 1,
        "empty_prompt": 1,
        "image_empty": 1,
        "image_truncated": 1,
        "margin_outside": 1,
    }
    assert (summary.read, summary.kept, summary.ties) == (60, 51, 1)
    assert [str(row) for row in summary.bad_rows][-3:] == [
        "a.parquet row 10: weight_outside (weight is -1, not a finite number from 0)",
        "a.parquet row 11: weight_outside (weight is inf, not a finite number from 0)",
        "a.parquet row 59: margin_outside (margin is inf, not a finite number)",
    ]
    assert LONG in PreferenceDataset.open(tmp_path / "out").prompts


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("prompt", {"promt": ["p"]}, r"has no column 'prompt' \(did you mean 'promt'\?\)"),
        ("rejected", {}, "has no column 'rejected'"),
        (None, {"wieght": [1.0]}, "has a column 'wieght': rename it to 'weight' or drop it"),
        (None, {"label": ["1"]}, "column 'label' is string, not numbers"),
        ("prompt", {"prompt": [[{"content": "p"}]]}, "column 'prompt' is list<.*>, not text"),
        ("chosen", {"chosen": ["a.png"]}, "column 'chosen' is string, not the bytes of images"),
    ],
)
def test_wrong_columns_are_refused_at_once(tmp_path, drop, add, message):
    file = write_trl(tmp_path / "a.parquet", pairs(1), **add) if not drop else None
    if drop:
        table = pq.read_table(write_trl(tmp_path / "a.parquet", pairs(1))).drop_columns(drop)
        for name, values in add.items():
            table = table.append_column(name, [values])
        pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        import_source("trl", file or tmp_path / "a.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_single_images_and_other_tables_are_no_pairs(tmp_path):
    pq.write_table(pa.table({"prompt": ["p"], "image": [jpeg(0)]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds single images"):
        import_source("trl", tmp_path / "a.parquet", tmp_path / "out")
    pq.write_table(pa.table({"prompt": ["p"], "choosen": [jpeg(0)]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'chosen' \(did you mean 'choosen'\?\)"):
        import_source("trl", tmp_path / "a.parquet", tmp_path / "out")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has neither pairs nor single images"):
        import_source("trl", tmp_path / "a.parquet", tmp_path / "out")


def test_every_file_is_checked_before_a_row_is_read(tmp_path):
    write_trl(tmp_path / "in" / "train-00000.parquet", pairs(1))
    file = write_trl(tmp_path / "in" / "train-00001.parquet", pairs(1))
    pq.write_table(pq.read_table(file).drop_columns("prompt"), file)
    with pytest.raises(UserError, match=r"train-00001\.parquet has no column 'prompt'"):
        import_source("trl", tmp_path / "in", tmp_path / "out")
