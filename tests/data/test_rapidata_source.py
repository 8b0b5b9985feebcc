"""Rapidata's sets: labels as shares of votes, the likelier winner first."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.datasets import jpeg

from diffpref.__main__ import main
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.importing import ImportOptions, import_source
from diffpref.data.schema import Dropped, Found, PairRow
from diffpref.data.sources import rapidata
from diffpref.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(file, rows: int = 1, **columns):
    struct = [{"bytes": jpeg(0), "path": "0.jpg"}] * rows
    table = {
        "prompt": ["p"] * rows,
        "image1": pa.array(struct, IMAGE),
        "image2": pa.array([{**cell, "bytes": jpeg(1)} for cell in struct], IMAGE),
        "model1": ["flux"] * rows,
        "model2": ["dalle-3"] * rows,
        "image1_path": ["flux/0.jpg"] * rows,
        "detailed_results": ["{}"] * rows,
        **columns,
    }
    pq.write_table(pa.table({name: values for name, values in table.items() if values is not None}), file)
    return file


def pair(label: float, margin: float, first_wins: bool = True) -> PairRow:
    sides = [(jpeg(0), "flux", "flux/0.jpg"), (jpeg(1), "dalle-3", None)]
    chosen, rejected = sides if first_wins else reversed(sides)
    return PairRow(
        id="a-0",
        prompt="p",
        chosen=chosen[0],
        rejected=rejected[0],
        label=label,
        margin=margin,
        chosen_id=chosen[2],
        rejected_id=rejected[2],
        chosen_model=chosen[1],
        rejected_model=rejected[1],
        source="rapidata",
    )


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ((18, 6), pair(0.75, 0.5)),
        ((1, 3), pair(0.75, 0.5, first_wins=False)),
        ((0, 5), pair(1.0, 1.0, first_wins=False)),
        ((4, 4), pair(0.5, 0.0)),
    ],
)
def test_votes(tmp_path, votes, expected):
    file = write(tmp_path / "a.parquet", votes_image1=[votes[0]], votes_image2=[votes[1]])
    assert list(rapidata.read(file, "train")) == [Found("a.parquet", 0, expected, agreement=expected.label)]


def test_weighted_preference_comes_before_votes_and_the_other_questions(tmp_path):
    columns = {
        "votes_image1": [0],
        "votes_image2": [9],
        "weighted_results_image1_coherence": pa.array([0.1], pa.float32()),
        "weighted_results_image2_coherence": pa.array([0.9], pa.float32()),
        "weighted_results_image1_preference": pa.array([0.625], pa.float32()),
        "weighted_results_image2_preference": pa.array([0.375], pa.float32()),
    }
    (row,) = rapidata.read(write(tmp_path / "a.parquet", **columns), "train")
    assert row.record == pair(0.625, 0.25)


def test_another_question_may_be_asked(tmp_path):
    names = [f"weighted_results_image{side}_{what}" for what in ("preference", "alignment") for side in (1, 2)]
    file = write(tmp_path / "a.parquet", **{name: [x] for name, x in zip(names, (1.0, 0.0, 0.25, 0.75), strict=True)})
    arguments = ["data", "import", "rapidata", str(file), str(tmp_path / "out"), "--columns"]
    assert main([*arguments, f"{names[0]}={names[2]}", f"{names[1]}={names[3]}"]) == 0
    assert list(PreferenceDataset.open(tmp_path / "out").rows()) == [pair(0.75, 0.5, first_wins=False)]


@pytest.mark.parametrize(
    ("votes", "reason", "bad"),
    [
        ((None, 3), "null_votes (votes_image1)", True),
        ((3, None), "null_votes (votes_image2)", True),
        ((0, 0), "no_votes (votes_image1 and votes_image2 are 0)", False),
        ((-1, 3), "votes_image1_outside (votes_image1 is -1, not a finite number from 0)", True),
    ],
)
def test_votes_that_say_nothing(tmp_path, votes, reason, bad):
    columns = {f"votes_image{side}": pa.array([votes[side - 1]], pa.int64()) for side in (1, 2)}
    (row,) = rapidata.read(write(tmp_path / "a.parquet", **columns), "train")
    assert isinstance(row, Dropped)
    assert str(row) == f"a.parquet row 0: {reason}"
    assert row.bad is bad


def test_ties_and_prompts(tmp_path):
    columns = {"votes_image1": [1, 2, 1], "votes_image2": [1, 1, 1], "prompt": ["p", None, " "]}
    file = write(tmp_path / "a.parquet", 3, **columns)
    summary = import_source("rapidata", file, tmp_path / "out", ImportOptions(max_bad_share=0.7))
    assert (summary.kept, summary.ties, summary.dropped) == (1, 1, {"null_prompt": 1, "empty_prompt": 1})


def test_missing_columns(tmp_path):
    with pytest.raises(UserError, match="has no columns of votes"):
        rapidata.count(write(tmp_path / "a.parquet", votes_image1=[1]), "train")
    with pytest.raises(UserError, match="has no column 'image2'"):
        rapidata.count(write(tmp_path / "a.parquet", votes_image1=[1], votes_image2=[1], image2=None), "train")
    with pytest.raises(UserError, match="column 'votes_image1' is string, not numbers"):
        rapidata.count(write(tmp_path / "a.parquet", votes_image1=["1"], votes_image2=[1]), "train")
