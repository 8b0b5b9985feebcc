"""`diffpref generate`: images that depend on prompt and seed alone, in a folder that one set fills."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from support.commands import fails
from support.tiny import copy_of, learn, load, make_unet, open_plain

from diffpref.__main__ import main
from diffpref.draws import draw_seed
from diffpref.evaluate.generate import to_images
from diffpref.models.loading import load_negative
from diffpref.sampling import Sampling, sample, scheduler_of
from diffpref.train.config import ModelConfig

PROMPTS = ["a red circle", "a blue cross", "a “green” square\u2028on grey", "a red circle on the left", "black"]
QUICK = ["--steps", "3", "--guidance-scale", "2"]


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def draw(pipeline, prompts, tmp_path, capsys):
    """Runs the command into a named folder of the test's own and returns the folder."""

    def run(name: str, *options: str, model: Path = pipeline) -> Path:
        capsys.readouterr()
        folder = tmp_path / name
        assert main(["generate", str(model), str(folder), "--prompts", str(prompts), *QUICK, *options]) == 0
        return folder

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_an_imagefolder_with_its_metadata(draw, capsys):
    folder = draw("out", "--images-per-prompt", "2", "--limit", "2")
    assert capsys.readouterr().out == f"4 images of 2 prompts in {folder}\n"
    assert sorted(contents(folder)) == ["00000-0.png", "00000-1.png", "00001-0.png", "00001-1.png", "metadata.jsonl"]
    found = rows(folder)
    assert [(row["file_name"], row["prompt"], row["index"]) for row in found] == [
        ("00000-0.png", "a red circle", 0),
        ("00000-1.png", "a red circle", 1),
        ("00001-0.png", "a blue cross", 0),
        ("00001-1.png", "a blue cross", 1),
    ]
    assert found[3]["seed"] == draw_seed(0, "a blue cross", 1) % 2**32
    settings = {"sampler": "ddim", "steps": 3, "guidance_scale": 2.0, "resolution": 32}
    assert all(row.items() >= settings.items() for row in found)
    assert len({row["model"] for row in found}) == 1 and len(found[0]["model"]) == 12
    assert Image.open(folder / "00001-1.png").size == (32, 32)
    assert (folder / "00000-0.png").read_bytes() != (folder / "00000-1.png").read_bytes()


def test_an_image_is_the_plain_pipelines_for_its_seed(draw, pipeline):
    row = rows(folder := draw("out", "--limit", "2", "--batch-size", "1"))[1]
    plain = open_plain(pipeline)
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    generator = torch.Generator().manual_seed(row["seed"])
    image = plain(row["prompt"], num_inference_steps=3, guidance_scale=2, generator=generator, height=32, width=32)
    assert Image.open(folder / row["file_name"]).tobytes() == image.images[0].tobytes()


def test_batches_change_nothing(draw):
    one, four = draw("one", "--batch-size", "1"), draw("four", "--batch-size", "4")
    assert rows(one) == rows(four) and [row["prompt"] for row in rows(one)] == PROMPTS
    for row in rows(one):
        a, b = (torch.tensor(list(Image.open(f / row["file_name"]).tobytes())) for f in (one, four))
        assert (a - b).abs().max() <= 1 and (a != b).float().mean() < 0.01  # a tie of rounding, no more


def test_the_place_of_a_prompt_does_not_matter(draw, prompts):
    first = draw("first", "--batch-size", "1")
    images = {row["prompt"]: (first / row["file_name"]).read_bytes() for row in rows(first)}
    prompts.write_text("\n".join(["another", *prompts.read_text(encoding="utf-8").split("\n")[::-1]]), encoding="utf-8")
    second = draw("second", "--batch-size", "1")
    for row in rows(second):
        assert row["prompt"] == "another" or (second / row["file_name"]).read_bytes() == images[row["prompt"]]


def test_a_cut_run_goes_on_and_keeps_what_is_there(draw, pipeline, prompts, tmp_path, monkeypatch):
    whole = contents(draw("whole", "--batch-size", "1"))
    save, saved = Image.Image.save, []

    def save_three(self, *arguments, **options):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", save_three)
    assert (
        main(["generate", str(pipeline), str(tmp_path / "cut"), "--prompts", str(prompts), *QUICK, "--batch-size", "1"])
        == 130
    )
    monkeypatch.setattr(Image.Image, "save", save)
    left = contents(tmp_path / "cut")
    assert len([name for name in left if name.endswith(".png")]) == 3 and "metadata.jsonl" not in left
    folder = draw("cut", "--batch-size", "1")
    assert contents(folder) == whole


def test_existing_files_are_not_drawn_again(draw):
    folder = draw("out")
    before = contents(folder)
    (folder / "00000-0.png").write_bytes(b"mine")
    (folder / "00001-0.png").unlink()
    draw("out")
    after = contents(folder)
    assert after.pop("00000-0.png") == b"mine"
    assert all(after[name] == before[name] for name in after if name != "00001-0.png")
    assert Image.open(folder / "00001-0.png").size == (32, 32)


OTHER = "holds images of another model, or of other prompts, seeds or settings; choose another folder"


@pytest.mark.parametrize(
    "change", [["--seed", "1"], ["--steps", "4"], ["--sampler", "euler"], ["--guidance-scale", "3"], ["--limit", "2"]]
)
def test_a_folder_of_other_settings_is_left_alone(draw, pipeline, prompts, capsys, change):
    folder = draw("out")
    before = contents(folder)
    arguments = ["generate", str(pipeline), str(folder), "--prompts", str(prompts), *QUICK, *change]
    assert fails(capsys, arguments) == f"{folder} {OTHER}"
    assert contents(folder) == before


def test_a_folder_of_another_model_is_left_alone(draw, pipeline, prompts, capsys, tmp_path):
    folder, other = draw("out"), copy_of(pipeline, tmp_path / "other")
    draw("out", model=other)  # the same weights elsewhere are the same model
    make_unet().save_pretrained(other / "unet")
    assert (
        fails(capsys, ["generate", str(other), str(folder), "--prompts", str(prompts), *QUICK]) == f"{folder} {OTHER}"
    )


def test_a_folder_of_other_prompts_or_other_files_is_left_alone(draw, pipeline, prompts, capsys, tmp_path):
    folder = draw("out")
    prompts.write_text("something else\n")
    arguments = ["generate", str(pipeline), str(folder), "--prompts", str(prompts), *QUICK]
    assert fails(capsys, arguments) == f"{folder} {OTHER}"
    arguments[2] = str(tmp_path)
    assert fails(capsys, arguments) == f"{tmp_path} holds other files; choose an empty folder"
    assert not (tmp_path / "metadata.jsonl").exists() and not (tmp_path / "plan.jsonl").exists()


@pytest.mark.parametrize("file", ["metadata.jsonl", "plan.jsonl"])
def test_a_foreign_list_in_the_folder_is_named(pipeline, prompts, capsys, tmp_path, file):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text("{not json\n")
    arguments = ["generate", str(pipeline), str(tmp_path / "out"), "--prompts", str(prompts)]
    assert fails(capsys, arguments).startswith(f"{tmp_path / 'out' / file} is not one of ours: ")


def test_lora_and_unet_change_the_images(draw, pipeline, v_pipeline, tmp_path):
    base = rows(draw("base", "--limit", "1"))
    torch.manual_seed(0)
    trained = load(pipeline, trainable=True, lora_rank=2)
    for name, parameter in trained.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    trained.save(tmp_path / "final", lora=True)
    images = {(tmp_path / "base" / "00000-0.png").read_bytes()}
    for name, options in {"lora": ["--lora", str(tmp_path / "final")], "unet": ["--unet", str(v_pipeline)]}.items():
        folder = draw(name, "--limit", "1", *options)
        images.add((folder / "00000-0.png").read_bytes())
        assert rows(folder)[0]["model"] != base[0]["model"] and rows(folder)[0]["seed"] == base[0]["seed"]
    assert len(images) == 3


def test_a_resolution_of_ones_own(draw):
    assert Image.open(draw("out", "--limit", "1", "--resolution", "48") / "00000-0.png").size == (48, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixed-precision", "fp16"], "mixed_precision: fp16 does not run on a CPU; use bf16 or no"),
        (["--resolution", "33"], "resolution: 33 is no multiple of the VAE's 4"),
        (["--steps", "0"], "--steps: 0 is not above 0"),
        (["--steps", "2000"], "sampling steps: "),
        (["--batch-size", "0"], "--batch-size: 0 is not above 0"),
        (["--images-per-prompt", "-1"], "--images-per-prompt: -1 is not above 0"),
        (["--limit", "-1"], "--limit: -1 is not 0 or above"),
        (["--resolution", "-8"], "--resolution: -8 is not 0 or above"),
        (["--guidance-scale", "nan"], "--guidance-scale: nan is not 0 or above"),
        (["--sampler", "fast"], "invalid choice 'fast' for argument '--sampler'"),
        (["--unet", "/none"], "model.unet: /none is no folder and no hub id"),
        (["--lora", "/none"], "model.lora: /none is not there"),
    ],
)
def test_wrong_options(pipeline, prompts, tmp_path, capsys, options, message):
    arguments = ["generate", str(pipeline), str(tmp_path / "out"), "--prompts", str(prompts), *options]
    assert fails(capsys, arguments).startswith(message)
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe"])
def test_wrong_prompt_files(pipeline, tmp_path, capsys, content):
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    message = fails(capsys, ["generate", str(pipeline), str(tmp_path / "out"), "--prompts", str(file)])
    assert message.startswith(f"prompts: {file} ")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_cannot_be_written(pipeline, prompts, tmp_path, capsys, place):
    (tmp_path / "file").touch()
    message = fails(capsys, ["generate", str(pipeline), str(tmp_path / place), "--prompts", str(prompts)])
    assert message.startswith(f"cannot write {tmp_path / place}: ")


def test_a_model_without_a_vae(pipeline, prompts, tmp_path, capsys):
    broken = copy_of(pipeline, tmp_path / "broken")
    (broken / "vae").rename(tmp_path / "vae")
    message = fails(capsys, ["generate", str(broken), str(tmp_path / "out"), "--prompts", str(prompts)])
    assert message.startswith(f"{broken} has no vae/ folder")
    assert not (tmp_path / "out").exists()


def test_missing_arguments_are_named(capsys):
    message = fails(capsys, ["generate"])
    assert message.startswith("Missing from diffpref generate: MODEL ") and "--prompts" in message


class TestNegative:
    def test_the_same_weights_change_nothing(self, draw, pipeline):
        alone, against = draw("alone"), draw("against", "--negative", str(pipeline))
        assert {name: data for name, data in contents(alone).items() if name.endswith("png")} == {
            name: data for name, data in contents(against).items() if name.endswith("png")
        }
        assert rows(alone)[0]["model"] != rows(against)[0]["model"]

    def test_lora_weights_guide_from_the_other_side(self, draw, pipeline, tmp_path, capsys):
        tuned = load(pipeline, trainable=True, lora_rank=2)
        learn(tuned)
        tuned.save(tmp_path / "negative", lora=True)
        plain, guided = draw("plain"), draw("guided", "--negative", str(tmp_path / "negative"))
        assert contents(plain)["00000-0.png"] != contents(guided)["00000-0.png"]
        expected = sample(
            load(pipeline),
            scheduler_of("ddim", load(pipeline).scheduler_config),
            PROMPTS[:1],
            [rows(guided)[0]["seed"]],
            32,
            Sampling("ddim", 3, 2.0),
            load(pipeline, lora=(str(tmp_path / "negative"),)),
        )
        image = to_images(load(pipeline).decode(expected))[0]
        assert np.abs(np.asarray(image, int) - np.asarray(Image.open(guided / "00000-0.png"), int)).max() <= 1

    @pytest.mark.parametrize("merge", [0.0, 0.25, 1.0])
    def test_lora_weights_stand_upon_the_tuned_model(self, pipeline, tmp_path, merge):
        """Against b + (1 - w)(t - b) + n of all three networks' weights."""
        places = []
        for number in range(2):
            torch.manual_seed(number)
            tuned = load(pipeline, trainable=True, lora_rank=2)
            learn(tuned)
            places.append(str(tmp_path / str(number)))
            tuned.save(Path(places[-1]), lora=True)
        model = ModelConfig(str(pipeline), lora=(places[0],), lora_scales=(0.5,))
        positive = load(pipeline, lora=model.lora, lora_scales=model.lora_scales)
        found = load_negative(model, positive, places[1], merge, torch.float32).net.state_dict()
        base, offset = load(pipeline).net.state_dict(), load(pipeline, lora=(places[1],)).net.state_dict()
        for name, value in positive.net.state_dict().items():
            b = base[name]
            torch.testing.assert_close(found[name], b + (1 - merge) * (value - b) + offset[name] - b)

    def test_a_tuned_model_against_its_negative(self, draw, pipeline, tmp_path):
        tuned = load(pipeline, trainable=True, lora_rank=2)
        learn(tuned)
        place = str(tmp_path / "lora")
        tuned.save(Path(place), lora=True)
        images = {
            name: contents(draw(name, *options))["00000-0.png"]
            for name, options in {
                "tuned": ["--lora", place],
                "weak": ["--lora", place, "--lora-scales", "0.5"],
                "full": ["--lora", place, "--negative", place],
                "merged": ["--lora", place, "--negative", place, "--merge-weight", "1"],
            }.items()
        }
        assert images["merged"] == images["tuned"]  # b + n is the tuned model itself, so nothing guides anew
        assert len({images["tuned"], images["weak"], images["full"]}) == 3

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--merge-weight", "0.5"], "--merge-weight: there is nothing to take out"),
            (["--merge-weight", "2", "--negative", "x", "--lora", "y"], "--merge-weight: 2.0 is not from 0 to 1"),
            (["--lora", "x", "y", "--lora-scales", "1"], "--lora-scales: 1 numbers for 2 of --lora"),
        ],
    )
    def test_weights_that_do_not_fit_are_refused(self, pipeline, prompts, tmp_path, capsys, options, expected):
        given = ["generate", str(pipeline), str(tmp_path / "out"), "--prompts", str(prompts), *options]
        assert fails(capsys, given).startswith(expected)

    def test_a_merge_weight_is_not_for_another_pipeline(self, pipeline, prompts, tmp_path, capsys):
        options = ["--prompts", str(prompts), "--unet", str(pipeline), "--negative", str(pipeline)]
        given = ["generate", str(pipeline), str(tmp_path / "out"), *options, "--merge-weight", "0.5"]
        assert fails(capsys, given).startswith("--merge-weight: it is for LoRA weights")

    def test_nothing_to_guide_is_refused(self, pipeline, prompts, tmp_path, capsys):
        options = ["--prompts", str(prompts), "--negative", str(pipeline), "--guidance-scale", "1", "--steps", "2"]
        assert "guidance" in fails(capsys, ["generate", str(pipeline), str(tmp_path / "out"), *options])


def test_a_sampler_of_flows_is_refused_before_weights_are_loaded(pipeline, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffpref.models.loading.load_backbone", None)
    message = fails(
        capsys, ["generate", str(pipeline), str(tmp_path / "out"), "--prompts", str(prompts), "--sampler", "flow"]
    )
    assert message.startswith("--sampler: ") and "'flow'" in message and "ddim" in message


def test_prompts_of_a_dataset(pipeline, tiny_pairs, tmp_path):
    assert main(["generate", str(pipeline), str(tmp_path / "out"), "--prompts", str(tiny_pairs), *QUICK]) == 0
    found = [row["prompt"] for row in rows(tmp_path / "out")]
    assert found[0] == "a red circle number 0" and len(set(found)) == len(found) > 3


def test_cut_prompts_are_counted(pipeline, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a red circle\n" + "a red circle " * 20 + "\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), *QUICK]
    assert main(["generate", str(pipeline), str(tmp_path / "out"), *options]) == 0
    assert "1 of 2 prompts" in caplog.text


class TestRanks:
    def test_a_rank_that_comes_late_has_nothing_to_do(self, draw, monkeypatch, capsys):
        folder = draw("out")
        before = contents(folder)
        monkeypatch.setenv("RANK", "1")
        draw("out")
        assert capsys.readouterr().out == ""
        assert contents(folder) == before
        (folder / "00001-0.png").unlink()
        draw("out")  # and draws what is missing, though metadata.jsonl is there
        assert contents(folder) == before | {".claims.part": b""}  # the main rank would remove it

    @pytest.mark.slow
    def test_ranks_share_the_images(self, draw, pipeline, prompts, tmp_path):
        alone = draw("alone", "--images-per-prompt", "6", "--batch-size", "2")
        together = tmp_path / "together"
        launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "-m", "diffpref", "generate"]
        options = ["--prompts", str(prompts), *QUICK, "--images-per-prompt", "6", "--batch-size", "2"]
        done = subprocess.run(
            [sys.executable, *launch, str(pipeline), str(together), *options], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("30 images of 5 prompts") == 1
        assert contents(together) == contents(alone)
