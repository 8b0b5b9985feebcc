"""Bad input to `train`: one line, exit code 2, and nothing half-written."""

import shutil

import pytest
from support.datasets import encoded, noise
from support.tiny import make_pairs, write_pairs

from diffpref.__main__ import main


def refused(capsys, *arguments: object) -> str:
    """The one line on stderr with which a command refuses its input."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffpref: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def run(pipeline, tmp_path):
    """The command line of a tiny run but for its data."""
    output = tmp_path / "run"
    short = ["--train.max-steps", "1", "--train.batch-size", "2", "--validation.steps", "0"]
    model = ["--model.pretrained", pipeline, "--data.flip", "false", "--data.holdout", "0", "--data.resolution", "32"]
    return ["train", "sd15-dpo", *short, *model, "--train.mixed-precision", "no", "--output-dir", output]


def test_missing_dataset(run, tmp_path, capsys):
    assert "nowhere" in refused(capsys, *run, "--data.path", tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_all_ties(run, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs", make_pairs(4, label=[0.5] * 4))
    assert "all 4 pairs are ties" in refused(capsys, *run, "--data.path", pairs)
    assert not (tmp_path / "run").exists()
    assert main([str(part) for part in (*run, "--data.path", pairs, "--data.ties", "soft")]) == 0


def test_model_without_a_vae(run, tmp_path, pipeline, tiny_pairs, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(pipeline, broken)
    shutil.rmtree(broken / "vae")
    line = refused(capsys, *run, "--data.path", tiny_pairs, "--model.pretrained", broken)
    assert f"{broken} has no vae/ folder" in line
    assert not (tmp_path / "run").exists()


def test_folder_that_holds_another_run(run, tmp_path, tiny_pairs, capsys):
    assert main([str(part) for part in (*run, "--data.path", tiny_pairs)]) == 0
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    assert "holds a run; add --resume" in refused(capsys, *run, "--data.path", tiny_pairs)
    line = refused(capsys, *run, "--data.path", tiny_pairs, "--resume", "--objective.beta", "7")
    assert "objective.beta: the run to resume has 5000.0" in line
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


def test_output_below_a_file(run, tmp_path, tiny_pairs, capsys):
    (tmp_path / "file").write_text("")
    line = refused(capsys, *run, "--data.path", tiny_pairs, "--output-dir", tmp_path / "file" / "run")
    assert f"{tmp_path / 'file'} is a file" in line


def test_one_broken_image_is_named_and_skipped(run, tmp_path, caplog):
    pairs = make_pairs(24, rejected=[b"no image" if n == 5 else encoded(noise(n, 32, 32)) for n in range(24)])
    folder = write_pairs(tmp_path / "pairs", pairs)
    assert main([str(part) for part in (*run, "--data.path", folder)]) == 0
    assert "23 pairs to train on, 0 held out; left out: 1 unreadable" in caplog.text
    assert "pair-5" in (tmp_path / "run" / "skipped_rows.json").read_text()


def test_many_broken_images_stop(run, tmp_path, capsys):
    pairs = make_pairs(24, rejected=[b"no image" if n < 2 else encoded(noise(n, 32, 32)) for n in range(24)])
    folder = write_pairs(tmp_path / "pairs", pairs)
    line = refused(capsys, *run, "--data.path", folder)
    assert "2 of 24 rows have images that cannot be read (over 5%); the first is row pair-0" in line
    assert not (tmp_path / "run").exists()


def test_resolution_that_the_vae_cannot_halve(run, tmp_path, tiny_pairs, capsys):
    assert "resolution: 30 is no multiple of the VAE's 4" in refused(
        capsys, *run, "--data.path", tiny_pairs, "--data.resolution", "30"
    )
