"""A run folder is read as it was left, finished or not."""

import math
from pathlib import Path

import pytest
from support.generated import make_folder, make_run

from diffpref.errors import UserError
from diffpref.report.run import Series, read_run


def metrics(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_a_run_is_read(tmp_path: Path):
    record = read_run(make_run(tmp_path / "run", steps=40))
    loss, held_out = record.series("loss"), record.series("heldout_accuracy")
    assert loss.steps == [float(step) for step in range(1, 41)]
    assert held_out.steps == [5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 40.0]
    assert record.series("never_logged") == Series()
    assert record.config is not None
    assert record.config.startswith("output_dir")
    assert record.samples == tmp_path / "run" / "samples" / "step-40"


def test_the_newest_whole_samples_are_taken(tmp_path: Path):
    run = metrics(tmp_path / "run", "")
    for step in (9, 10):
        make_folder(run / "samples" / f"step-{step}")
    (run / "samples" / "step-100").mkdir()
    (run / "samples" / "step-last").mkdir()
    assert read_run(run).samples == run / "samples" / "step-10"


def test_a_resumed_run_counts_each_step_once(tmp_path: Path):
    lines = '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "heldout_loss": 9}\n{"step": 2, "loss": 1}\n'
    record = read_run(metrics(tmp_path, lines))
    assert record.series("loss") == Series([1.0, 2.0], [3.0, 1.0])
    assert record.series("heldout_loss") == Series([2.0], [9.0])


def test_an_unfinished_last_line_is_left_out(tmp_path: Path):
    record = read_run(metrics(tmp_path, '{"step": 1, "loss": 3}\n{"step": 2, "lo'))
    assert record.series("loss").values == [3.0]


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "[1]", '{"loss": 1}', '{"step": null}'])
def test_a_wrong_line_within_is_named(tmp_path: Path, line: str):
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2: not"):
        read_run(metrics(tmp_path, f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'))


def test_values_that_are_no_numbers_are_gaps(tmp_path: Path):
    lines = '{"step": 1, "loss": NaN}\n{"step": 2, "loss": null}\n{"step": 3, "loss": "x"}\n{"step": 4, "loss": 2}\n'
    series = read_run(metrics(tmp_path, lines)).series("loss")
    assert [math.isnan(value) for value in series.values] == [True, True, True, False]
    assert series.final() == series.median() == 2.0


def test_a_missing_run_and_an_empty_one(tmp_path: Path):
    with pytest.raises(UserError, match="no such run folder"):
        read_run(tmp_path / "nowhere")
    record = read_run(tmp_path)
    assert (record.metrics, record.config, record.environment, record.samples) == ([], None, None, None)


def test_where_a_series_ends():
    steps = [float(step) for step in range(40)]
    assert Series(steps[:3], [1.0, 2.0, math.nan]).final() == 2.0
    assert Series(steps, [0.0] * 36 + [1.0, 2.0, 3.0, 4.0]).final() == 2.5
    assert Series().final() is None
    assert Series().median() is None
    assert Series(steps[:3], [5.0, 1.0, 2.0]).median() == 2.0
