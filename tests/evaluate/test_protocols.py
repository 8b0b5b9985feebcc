"""Published evaluations: their values, the table beside the published figures, and the command."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.commands import fails
from support.generated import read_rows, write_rows

from diffpref.__main__ import main
from diffpref.errors import UserError
from diffpref.evaluate.outcome import HEADER, cells, markdown, row_of
from diffpref.evaluate.protocols import PROTOCOLS, protocol
from diffpref.evaluate.score import Scores
from diffpref.evaluate.targets import folder_target
from diffpref.evaluation import Evaluation
from diffpref.presets import embedded
from diffpref.scorers.base import scorer_names

SCORER = """
import numpy as np
class Brightness:
    name, version = "{name}", "1"
    def __call__(self, images, prompts):
        return [float(np.asarray(image).mean()) / 255 for image in images]
def load(device):
    return Brightness()
"""


def folder(path: Path, count: int = 4) -> Path:
    path.mkdir()
    for place in range(count):
        Image.new("RGB", (4, 4)).save(path / f"{place}.png")
    write_rows(path, [{"file_name": f"{n}.png", "prompt": f"p{n // 2}", "index": n % 2} for n in range(count)])
    return path


def test_dros_settings_and_figures():
    for name, table in (("pickapic-test", "table 3"), ("hpdv2", "table 4")):
        found = protocol(name)
        how = (found.sampler, found.steps, found.guidance_scale, found.images_per_prompt)
        assert how == ("ddpm", 50, 7.5, 5)
        assert [figure.scorer for figure in found.published] == list(found.scorers)
        assert all(figure.source.endswith(table) for figure in found.published)
    pickscore, imagereward = protocol("pickapic-test").figure("pickscore"), protocol("hpdv2").figure("imagereward")
    assert (pickscore.base, pickscore.tuned) == (20.68, 21.00) and pickscore.delta == pytest.approx(0.32)
    assert (imagereward.base, imagereward.tuned) == (0.2242, 0.4070)
    assert protocol("pickapic-validation").figure("hpsv2.1").delta == pytest.approx(1.49)
    assert protocol("pickapic-validation").steps == 20


def test_the_embedded_protocol_is_the_demos():
    found = protocol("embedded")
    how = (found.sampler, found.steps, found.guidance_scale)
    assert how == (embedded.SAMPLER, embedded.INFERENCE_STEPS, embedded.GUIDANCE_SCALE)
    assert set(found.scorers) <= set(scorer_names())


def test_every_published_scorer_is_one_of_the_protocols():
    for each in PROTOCOLS:
        assert {figure.scorer for figure in each.published} <= set(each.scorers)
    with pytest.raises(UserError, match="did you mean 'hpdv2'"):
        protocol("hpdv3")


def test_a_row_by_hand(tmp_path):
    target = folder_target(folder(tmp_path / "images"))
    model = Scores(target, "pickscore", "1", (21.0, 22.0, 23.0, np.nan))
    base = Scores(target, "pickscore", "1", (20.0, 22.0, 22.5, 22.0))
    row = row_of(protocol("pickapic-test"), model, base)
    assert (row.model.value, row.base.value) == (22.0, 21.625)
    assert row.base.error == pytest.approx(np.std([21.0, 22.25], ddof=1) / 2**0.5)
    assert row.delta.value == pytest.approx(0.5)  # of the three images that both have
    assert (row.images, row.prompts) == (3, 2)
    assert row.over_base == pytest.approx(22 - 20.68) and row.over_tuned == pytest.approx(1.0)
    assert row.published_delta == pytest.approx(0.32) and row.over_delta == pytest.approx(0.18)
    header, line = cells([row])
    assert header == HEADER
    assert line[0] == "pickscore" and line[3:] == (
        "+0.5000 ± 0.0000",
        "20.6800",
        "+1.3200",
        "21.0000",
        "+1.0000",
        "+0.3200",
        "+0.1800",
    )
    page = markdown("title", [row], ["a note"])
    assert f"| {' | '.join(HEADER)} |" in page and "- a note\n" in page


def test_without_a_base_and_figures_their_columns_are_left_out(tmp_path):
    target = folder_target(folder(tmp_path / "images"))
    row = row_of(protocol("embedded"), Scores(target, "embedded-judge", "1", (0.5,) * 4), None)
    assert cells([row]) == [("scorer", "model"), ("embedded-judge", "0.5000 ± 0.0000")]
    assert row.over_delta is None and row.base is None and json.dumps(row.told())


def test_the_protocols_split_is_read(tmp_path):
    for split in ("test", "test_unique", "train"):
        pq.write_table(pa.table({"caption": [split]}), tmp_path / f"{split}-00000.parquet")

    def read(name: str, split: str | None = None) -> list[str]:
        given = Evaluation(protocol(name), "m", None, str(tmp_path), split, 0, 0, 0, 1, 1)
        return [prompt.text for prompt in given.read_prompts()]

    assert read("pickapic-test") == ["test_unique"]
    assert read("pickapic-test", "test") == ["test"]
    with pytest.raises(UserError, match=r"--prompts: name your copy of PartiPrompts\.tsv"):
        Evaluation(protocol("partiprompts"), "m", None, None, None, 0, 0, 0, 1, 1).read_prompts()


class TestCommand:
    @pytest.fixture
    def arguments(self, pipeline, v_pipeline, tmp_path):
        (tmp_path / "styles").mkdir()
        (tmp_path / "styles" / "photo.json").write_text(json.dumps(["a red circle", "a blue cross"]))
        for name in ("pickscore", "own"):
            (tmp_path / f"{name}.py").write_text(SCORER.format(name=name))
        scorers = f"{tmp_path / 'pickscore.py'},{tmp_path / 'own.py'},{tmp_path / 'none.py'}"
        options = ["--prompts", str(tmp_path / "styles"), "--base", str(v_pipeline), "--scorer", scorers]
        quick = ["--steps", "2", "--images-per-prompt", "1", "--guidance-scale", "1"]
        return ["evaluate", "hpdv2", str(pipeline), str(tmp_path / "out"), *options, *quick]

    def test_from_end_to_end_and_again(self, arguments, tmp_path, capsys, monkeypatch):
        line = fails(capsys, arguments)
        assert line.startswith("1 of 3 scorers cannot be loaded (--skip-missing leaves them out): ")
        assert str(tmp_path / "none.py") in line and not (tmp_path / "out").exists()
        assert main([*arguments, "--skip-missing", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        pickscore, own = found["scorers"]
        assert list(found["left_out"]) == [str(tmp_path / "none.py")]
        assert pickscore["published_tuned"] == 21.30 and own["published_tuned"] is None
        assert pickscore["over_tuned"] == pytest.approx(pickscore["model"]["value"] - 21.30)
        assert pickscore["delta"]["value"] == pytest.approx(pickscore["model"]["value"] - pickscore["base"]["value"])
        assert pickscore["delta"]["value"] != 0
        for note in ("steps 2, not 50", "images_per_prompt 1, not 5", "left out: "):
            assert any(note in line for line in found["notes"])
        model, base = (read_rows(tmp_path / "out" / name) for name in ("model", "base"))
        assert [row["seed"] for row in model] == [row["seed"] for row in base]
        assert {row["category"] for row in model} == {"photo"}
        assert json.loads((tmp_path / "out" / "result.json").read_text()) == found
        monkeypatch.setattr("diffpref.evaluate.generate.sample", None)  # nothing is drawn again
        assert main([*arguments, "--skip-missing"]) == 0
        assert "pickscore" in capsys.readouterr().out
        assert fails(capsys, [*arguments, "--skip-missing", "--limit", "1"]).endswith("choose another folder")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--steps", "0"], "--steps: 0 is not above 0"),
            (["--limit", "-1"], "--limit: -1 is not 0 or above"),
            (["--merge-weight", "0.5"], "--merge-weight: there is nothing to take out"),
            (["--sampler", "flow"], "--sampler: this model is no rectified flow"),
        ],
    )
    def test_wrong_options(self, arguments, capsys, options, message):
        assert fails(capsys, [*arguments, "--skip-missing", *options]).startswith(message)
