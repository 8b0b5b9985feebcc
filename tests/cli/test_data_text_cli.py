"""`diffpref data caption` and `data perturb` as a user calls them: models in folders, a server, files, training."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.commands import fails
from support.datasets import encoded, make_images, write_rows
from support.language import make_chat, make_llava, make_t5
from support.server import Server, completion
from support.tiny import make_pairs

from diffpref.__main__ import main
from diffpref.captioners import endpoint
from diffpref.data.dataset import PreferenceDataset
from diffpref.embedded import world
from diffpref.perturbers import dipper

KEY = "sk-very-secret-0123456789"


def run(capsys, *arguments: object) -> dict:
    """The counts that a data command prints."""
    capsys.readouterr()
    assert main(["data", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def read(folder: Path) -> list:
    return list(PreferenceDataset.open(folder).rows())


def everything(folder: Path) -> str:
    """All files of a folder and below, as text."""
    return "".join(file.read_bytes().decode("latin-1") for file in sorted(folder.rglob("*")) if file.is_file())


def text_of(body: dict) -> str:
    """What a request says beside the image."""
    return body["messages"][0]["content"][1]["text"]


def answer(body: dict) -> tuple[int, dict, bytes]:
    return 200, {}, completion(f"of {text_of(body)}")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """Pairs of paintings of the embedded world; the prompt is the caption of what was wanted."""
    rng, known = np.random.default_rng(0), world.compositions()
    shown = [[encoded(Image.fromarray(world.paint(known[n], rng))) for n in some] for some in (range(8), range(20, 28))]
    rows = make_pairs(
        8,
        prompt=[known[n].caption() for n in range(8)],
        chosen=shown[0],
        rejected=shown[1],
        label=[1.0, 0.0, 0.5, 0.9, 0.2, 1.0, 1.0, 1.0],
    )
    return write_rows(tmp_path_factory.mktemp("painted") / "pairs", rows)


@pytest.fixture
def pairs(painted, tmp_path):
    """The same, where what is written beside it is a test's own."""
    return write_rows(tmp_path / "pairs", read(painted))


def trains(dataset: Path, output: Path, capsys) -> bool:
    run = ["train", "embedded-dcpo", "--data.path", dataset, "--output-dir", output, "--train.max-steps", "2"]
    run += ["--train.batch-size", "2", "--train.gradient-accumulation-steps", "1", "--data.holdout", "0"]
    code = main([*map(str, run), "--validation.steps", "0"])
    assert code == 0, capsys.readouterr().err
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return any(line.get("step") == 2 for line in steps) and (output / "final" / "model_index.json").is_file()


def test_the_papers_three_modes(pairs, tmp_path, capsys):
    known = [composition.caption() for composition in world.compositions()]
    told = run(capsys, "caption", pairs, tmp_path / "c")
    assert told["options"] == {"captioner": "embedded", "version": "1"} and told["missing"] == {}
    c = read(tmp_path / "c")
    assert [(row.chosen_prompt, row.rejected_prompt) for row in c] == [(known[n], known[n + 20]) for n in range(8)]

    told = run(capsys, "perturb", pairs, tmp_path / "p", "--mode", "p", "--level", "strong", "--seed", "5")
    assert told["options"] == {"mode": "p", "perturber": "rules", "version": "1", "level": "strong", "seed": 5}
    assert told["missing"] == {"a perturbed text: tie": 1}
    for row in read(tmp_path / "p"):
        better, worse = (row.chosen_prompt, row.rejected_prompt)[:: 1 if row.label >= 0.5 else -1]
        assert better == row.prompt
        assert (worse == row.prompt) == (row.label == 0.5)
        shared = world.read_caption(row.prompt).items() & world.read_caption(worse).items()
        assert not shared or row.label == 0.5

    run(capsys, "perturb", tmp_path / "c", tmp_path / "h", "--mode", "h", "--level", "weak")
    for before, row in zip(c, read(tmp_path / "h"), strict=True):
        turned = 1 if row.label >= 0.5 else -1
        better, worse = (row.chosen_prompt, row.rejected_prompt)[::turned]
        former = (before.chosen_prompt, before.rejected_prompt)[::turned]
        assert better == former[0] and (worse == former[1]) == (row.label == 0.5)
    described = json.loads((tmp_path / "h" / "dataset.json").read_text())
    assert described["source"] == "perturb" and described["origin"]["source"] == "caption"
    for mode in ("c", "p", "h"):
        assert trains(tmp_path / mode, tmp_path / f"run-{mode}", capsys)


def test_a_vision_language_model_from_a_folder_and_a_file(pairs, tmp_path, capsys):
    model = make_llava(tmp_path / "llava")
    file = tmp_path / "captions.yaml"
    file.write_text(
        yaml.safe_dump(
            {"captioner": "transformers", "model": str(model), "template": "What is it? {prompt}", "max_new_tokens": 4}
        )
    )
    told = run(capsys, "caption", pairs, tmp_path / "out", "--config", file, "--batch-size", "3")
    options = told["options"]
    assert options["template"] == "What is it? {prompt}" and options["max_new_tokens"] == 4
    assert options["model"] == str(model) and len(options["version"].split()) == 2
    assert not {"batch_size", "device", "url"} & set(options)
    first = read(tmp_path / "out")
    assert all(row.chosen_prompt and row.rejected_prompt for row in first)
    run(capsys, "caption", pairs, tmp_path / "again", "--config", file, "--batch-size", "1", "--ledger", tmp_path / "l")
    assert read(tmp_path / "again") == first
    run(capsys, "caption", pairs, tmp_path / "longer", "--config", file, "--max-new-tokens", "6")
    assert all(
        a.chosen_prompt[:2] == b.chosen_prompt[:2] for a, b in zip(first, read(tmp_path / "longer"), strict=True)
    )
    assert read(tmp_path / "longer") != first


@pytest.mark.parametrize("name", ["dipper", "transformers"])
def test_models_that_perturb_give_the_same_texts_again(pairs, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(dipper, "MAX_LENGTH", 10)
    model = make_t5(tmp_path / "model") if name == "dipper" else make_chat(tmp_path / "model")
    options = ["--perturber", name, "--model", model] + (["--max-new-tokens", "6"] if name == "transformers" else [])
    told = run(capsys, "perturb", pairs, tmp_path / "out", *options, "--batch-size", "4", "--level", "weak")
    assert told["options"]["level"] == "weak" and told["options"]["perturber"] == name
    first = read(tmp_path / "out")
    (tmp_path / "pairs.answers").rename(tmp_path / "gone")
    run(capsys, "perturb", pairs, tmp_path / "again", *options, "--batch-size", "1", "--level", "weak")
    assert read(tmp_path / "again") == first
    run(capsys, "perturb", pairs, tmp_path / "strong", *options, "--level", "strong")
    run(capsys, "perturb", pairs, tmp_path / "seed", *options, "--level", "weak", "--seed", "1")
    assert first != read(tmp_path / "strong") and first != read(tmp_path / "seed")


def test_a_server_that_fails_in_the_middle_is_asked_only_for_the_rest(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    rows = make_images(140, image=[encoded(Image.new("RGB", (8, 8), (n, 0, 0))) for n in range(140)])
    rows = [type(row)(**(vars(row) | {"prompt": f"prompt {n}"})) for n, row in enumerate(rows)]
    folder = write_rows(tmp_path / "images", rows)

    def reply(number, body):
        return (
            (503, {}, b"tired")
            if number >= 130
            else (200, {}, completion(f"of {body['messages'][0]['content'][1]['text']}"))
        )

    server.reply = reply
    command = ["data", "caption", folder, tmp_path / "out", "--captioner", "endpoint", "--url", server.url]
    command += ["--model", "eyes", "--key-variable", "THE_KEY", "--template", "{prompt}", "--tries", "2"]
    command = [str(word) for word in command]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert f"diffpref: {server.url} gave no caption in 2 tries: 503 Service Unavailable: tired" in shown.err
    assert not (tmp_path / "out").exists()
    asked = [text_of(body) for _, _, body in server.seen]
    assert set(asked[:128]) == {f"prompt {n}" for n in range(128)}
    server.seen.clear()
    server.reply = lambda number, body: answer(body)
    assert main(command) == 0
    again = [text_of(body) for _, _, body in server.seen]
    assert sorted(again) == sorted(f"prompt {n}" for n in range(128, 140))
    assert [row.image_prompt for row in read(tmp_path / "out")] == [f"of prompt {n}" for n in range(140)]
    printed = capsys.readouterr()
    assert KEY not in shown.err + shown.out + printed.err + printed.out
    assert KEY not in everything(tmp_path)
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert described["options"]["url"] == server.url and "key_variable" not in described["options"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "in", "out", "--captioner", "transformer"], "unknown captioner 'transformer': did you mean "),
        (
            ["caption", "in", "out", "--captioner", "transformers"],
            "--model: the captioner 'transformers' needs a model",
        ),
        (
            ["caption", "in", "out", "--model", "x"],
            "--model: the captioner 'embedded' has no such option; it takes: none",
        ),
        (
            ["caption", "in", "out", "--captioner", "transformers", "--model", "./x"],
            "--model: ./x is no folder and no hub",
        ),
        (["caption", "in", "out", "--config", "no.yaml"], "no.yaml cannot be read"),
        (["caption", "in", "out", "--config", "bad.yaml"], "bad.yaml: unknown key templat: did you mean 'template'?"),
        (["caption", "in", "out", "--workers", "0"], "--workers: 0 is not above 0"),
        (
            ["caption", "in", "out", "--captioner", "transformers", "--batch-size", "0"],
            "--batch-size must be at least 1, not 0",
        ),
        (
            ["caption", "in", "out", "--captioner", "endpoint", "--top-p", "1.5"],
            "--top-p must be between 0 and 1, not 1.5",
        ),
        (["perturb", "in", "out", "--mode", "c"], "--mode c perturbs nothing: `diffpref data caption` writes"),
        (["perturb", "in", "out", "--mode", "h"], "--mode h: in has no captions of images"),
        (["perturb", "images", "out"], "images holds single images; only of pairs is one image the worse one"),
        (["perturb", "in", "out", "--perturber", "rule"], "unknown perturber 'rule': did you mean 'rules'?"),
        (
            ["perturb", "in", "out", "--template", "x"],
            "--template: the perturber 'rules' has no such option; it takes:",
        ),
        (["perturb", "in", "out", "--level", "mild"], "--level"),
        (["perturb", "in", "in"], "the output in would replace the input in"),
        (["perturb", "nowhere", "out"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("in"), make_pairs(2))
    write_rows(Path("images"), make_images(2))
    Path("bad.yaml").write_text("templat: x\n")
    assert fails(capsys, ["data", *arguments]).startswith(message) or message == "--level"
    assert not Path("out").exists()
