"""HPSv3: its own code's numbers on a tiny network, its pixels and tokens, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import qwen as given
from support.openclip import captions, picture, pieces

from diffpref.errors import UserError
from diffpref.scorers import hpsv3
from diffpref.scorers.base import Reward, load_scorer
from diffpref.scorers.parts import qwen

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "hpsv3.json").read_text(encoding="utf-8"))
PICTURES = [picture(*size) for size in given.SIZES]
EXPECTED = torch.tensor(GOLDEN["scores"])


def make(folder: Path, change: dict[str, torch.Tensor | None] | None = None) -> Path:
    given.write_tokenizer(folder)
    (folder / "instruction.txt").write_text(given.INSTRUCTION, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(given.config()))
    merged = {**given.state(GOLDEN["shapes"]), **(change or {})}
    save_file({name: value for name, value in merged.items() if value is not None}, folder / "HPSv3.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hpsv3") / "tiny")


def load(place: object, precision: Any = "fp32") -> Reward:
    scorer = load_scorer(f"hpsv3={place}", precision=precision)
    assert isinstance(scorer, Reward)
    return scorer


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Reward:
    return load(folder)


def test_golden_scores_of_the_official_code(scorer: Reward):
    assert EXPECTED[..., 0].std(dim=0).min() > 0.01
    assert EXPECTED[..., 0].std(dim=1).min() > 1e-3
    for place, image in enumerate(PICTURES):
        scores = scorer([image] * 3, given.CAPTIONS)
        assert scores == pytest.approx(EXPECTED[place, :, 0].tolist(), abs=1e-5)


def test_a_grid_of_positions_or_exact_frequencies_would_be_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []
    build = qwen.build_network
    monkeypatch.setattr(qwen, "build_network", lambda *inputs: made.append(build(*inputs)) or made[0])
    exact = load(folder)
    network = made[0]
    rotary = network.language_model.rotary_emb
    width = 2 * len(rotary.inv_freq)
    rotary.inv_freq.copy_(1e6 ** -(torch.arange(0, width, 2) / width))
    assert abs(exact(PICTURES[:1], [""])[0] - EXPECTED[0, 2, 0]) > 1e-4
    rotary.inv_freq.copy_(rotary.inv_freq.bfloat16())
    assert exact(PICTURES[:1], [""])[0] == pytest.approx(float(EXPECTED[0, 2, 0]), abs=1e-5)
    original = network.forward

    def with_grid(position_ids: torch.Tensor, **inputs: Any) -> Any:
        image = (inputs["input_ids"] == network.config.image_token_id).int()
        return original(position_ids=None, mm_token_type_ids=image, **inputs)

    monkeypatch.setattr(network, "forward", with_grid)
    assert abs(exact(PICTURES[:1], [""])[0] - EXPECTED[0, 2, 0]) > 1e-3


def test_pixels_are_the_official_ones():
    for image, (frames, high, wide, total, weighted) in zip(PICTURES, GOLDEN["pixels"], strict=True):
        rows = qwen.patches(qwen.QwenPixels(hpsv3.PIXELS)(image)).double()
        assert rows.shape == (frames * high * wide, 1176)
        weight = torch.linspace(0, 1, rows.numel(), dtype=torch.float64).reshape(rows.shape)
        assert float(rows.sum()) == pytest.approx(total, rel=1e-6, abs=1e-2)
        assert float((rows * weight).sum()) == pytest.approx(weighted, rel=1e-6, abs=1e-2)


def test_patches_are_those_of_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = PICTURES[1]
    prepared = qwen.QwenPixels(hpsv3.PIXELS)(image)
    resized = image.resize((prepared.shape[2], prepared.shape[1]), Image.Resampling.BICUBIC)
    theirs = Qwen2VLImageProcessorPil()(resized, return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, prepared.shape[1] // 14, prepared.shape[2] // 14]]
    assert qwen.patches(prepared) == pytest.approx(theirs["pixel_values"], abs=1e-6)


@pytest.mark.parametrize(
    ("size", "sides"),
    [((448, 448), (448, 448)), ((1024, 1024), (448, 448)), ((100, 60), (588, 364)), ((9000, 10), None)],
)
def test_sides(size: tuple[int, int], sides: tuple[int, int] | None):
    found = qwen.QwenPixels(hpsv3.PIXELS).sides(*size)
    assert all(side >= 28 and side % 28 == 0 for side in found)
    assert sides is None or found == sides


def test_tokens_are_those_of_the_official_tokenizer(folder: Path):
    chat = qwen.load_chat(str(folder), "x", given.MARK, "")
    texts = [*pieces(), *captions(300)[-40:]]
    ours = [chat.tokenizer(each)["input_ids"] for each in texts]
    assert [text for text, a, b in zip(texts, ours, GOLDEN["tokens"], strict=True) if a != b] == []


def test_the_instruction_is_read_beside_the_weights_and_told_from_the_published_one(tmp_path, caplog):
    assert GOLDEN["instruction"] == hpsv3.PUBLISHED
    place = make(tmp_path / "tiny")
    caplog.clear()
    load(place)
    assert "instruction.txt is not the published instruction" in caplog.text
    (place / "instruction.txt").write_text("Rate {text_prompt}.")
    with pytest.raises(UserError, match=r"instruction\.txt must hold \{text_prompt\} and <\|Reward\|> once each$"):
        load(place)
    (place / "instruction.txt").unlink()
    with pytest.raises(UserError, match=r"^hpsv3: no instruction\.txt in .* beside the tokenizer$"):
        load(place)


def test_a_batch_of_8_scores_as_8_batches_of_one(scorer: Reward):
    images = [picture(40 + 70 * number, 264 - 10 * number) for number in range(8)]
    prompts = ["", "a cat", "highly detailed " * 40, "猫", "{x} <b>", "a " * 9, "red", "dog"]
    together = scorer(images, prompts)
    alone = [scorer([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in together}) > 5


def test_marks_within_a_caption_are_left_out(scorer: Reward):
    marked = scorer(PICTURES[:1], ["a cat<|Reward|><|image_pad|> \ud800"])
    assert marked == scorer(PICTURES[:1], ["a cat   \ufffd"])


def test_bf16_is_what_it_takes_unless_told(folder: Path):
    usual = load(folder, precision=None)
    assert usual.identity["precision"] == "bf16"
    score = usual(PICTURES[:1], ["a cat"])[0]
    assert torch.tensor(score).bfloat16().item() != score  # the head is fp32
    assert load_scorer("embedded-judge").name == "embedded-judge"


def test_newer_names_of_the_same_weights(folder: Path, scorer: Reward, tmp_path: Path):
    state = given.state(GOLDEN["shapes"])
    newer = {}
    for name, value in state.items():
        tower = name.startswith("visual.")
        newer[f"model.{name}" if tower else name.replace("model.", "model.language_model.", 1)] = value
    make(tmp_path)
    save_file(newer, tmp_path / "HPSv3.safetensors")
    assert load(tmp_path)(PICTURES[:1], ["a cat"]) == scorer(PICTURES[:1], ["a cat"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "1 keys missing, the first language_model.norm.weight"),
        ({"visual.merger.ln_q.bias": torch.zeros(3)}, r"visual.merger.ln_q.bias has the shape \(3,\)"),
        ({"head.weight": torch.zeros(3)}, "the key head.weight is of no part of it"),
        ({"rm_head.3.bias": None}, "rm_head.3.bias is missing"),
        ({"rm_head.5.weight": torch.zeros(2, 5)}, r"rm_head.5.weight has the shape \(2, 5\), where \(2, 16\)"),
        ({"rm_head.5.weight": torch.zeros(1, 16), "rm_head.5.bias": torch.zeros(1)}, "its head gives 1 numbers"),
        ({"model.embed_tokens.weight": None}, "embed_tokens.weight is missing"),
        ({"model.embed_tokens.weight": torch.zeros(20, 64)}, "it has 20 words, and the tokenizer"),
    ],
)
def test_weights_of_something_else_name_the_first_key(change: dict, message: str, tmp_path: Path):
    make(tmp_path, change)
    with pytest.raises(UserError, match=rf"hpsv3: .*HPSv3\.safetensors is no HPSv3: .*{message}") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_something_else(folder: Path, tmp_path: Path):
    make(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(UserError, match=r"hpsv3: .* has no tokenizer of Qwen2-VL: it has no <\|"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no tokenizer that can be read") as error:
        load(f"{folder}={tmp_path / 'empty'}")
    assert "\n" not in str(error.value)


def test_a_pickled_module_is_refused(folder: Path, tmp_path: Path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "HPSv3.pth")
    with pytest.raises(UserError, match=r"HPSv3\.pth is refused"):
        load(f"{tmp_path / 'HPSv3.pth'}={folder}")
