"""MPS: its own code's numbers, whatever the neighbours, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.blip import filled
from support.clip import config
from support.openclip import captions, picture, write_tokenizer

from diffpref.errors import UserError
from diffpref.scorers.base import Reward, load_scorer
from diffpref.scorers.parts.pixels import ClipPixels

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mps.json").read_text(encoding="utf-8"))
PICTURES = [picture(*size) for size in GOLDEN["sizes"]]


def published() -> dict[str, torch.Tensor]:
    """The weights as RE-N-Y/mpsv1 holds them: with a prefix, and with buffers of the official code."""
    state = filled({name: torch.Size(shape) for name, shape in GOLDEN["shapes"].items()}, GOLDEN["seed"])
    state["model.logit_scale"] = torch.tensor(4.6052)
    for name in [name for name in state if name.endswith("norm.weight") and name.startswith("cross_model")]:
        state[name.replace(".weight", ".bias")] = torch.zeros_like(state[name])
    state["cross_model.layers.0.1.fn.rotary_emb.inv_freq"] = torch.ones(32)
    state["model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {f"mps.{name}": value for name, value in state.items()}


def make(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config()))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("mps") / "tiny", published())


def load(place: object, **options: Any) -> Reward:
    scorer = load_scorer(f"mps={place}", **options)
    assert isinstance(scorer, Reward)
    return scorer


def test_golden_scores_of_the_official_code(folder: Path):
    scorer, expected = load(folder), torch.tensor(GOLDEN["scores"])
    scores = torch.tensor([[scorer([image], [text])[0] for text in GOLDEN["captions"]] for image in PICTURES])
    assert expected.std(dim=0).min() > 0.05
    assert expected.std(dim=1).min() > 0.05
    assert scores == pytest.approx(expected, abs=1e-4)
    together = scorer(PICTURES, GOLDEN["captions"][:3])
    assert together == pytest.approx(expected.diagonal(), abs=1e-4)


def test_a_batch_of_32_scores_as_32_batches_of_one(folder: Path):
    """The official code would divide all captions' likeness by that of the most alike word of the whole batch."""
    scorer = load(folder)
    images = [picture(40 + 7 * number, 64 - number) for number in range(32)]
    prompts = captions(60)[28:]
    together = scorer(images, prompts)
    alone = [scorer([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-5)  # a hundred has eight digits in fp32
    assert len({round(score, 4) for score in together}) > 20


def test_the_names_of_a_checkpoint_without_the_prefix(folder: Path, tmp_path: Path):
    make(tmp_path, {name.removeprefix("mps."): value for name, value in published().items()})
    assert load(tmp_path)(PICTURES, GOLDEN["captions"][:3]) == load(folder)(PICTURES, GOLDEN["captions"][:3])


def test_the_identity_tells_all_that_scores_depend_on(folder: Path):
    scorer = load(folder)
    assert scorer.prepare == ClipPixels("floor", 32)
    assert scorer.identity["architecture"] == (
        "CLIP patches of 8 in 32, vision and text 32x2/2 and 24x2/2, 2 cross layers of 3 heads"
    )
    assert "filled up by ends" in scorer.identity["text"]
    half = load(folder, precision="bf16")
    assert half.version != scorer.version
    assert any(torch.tensor(score).bfloat16().item() != score for score in half(PICTURES, GOLDEN["captions"][:3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mps.model.visual_projection.weight": None}, "does not fit CLIP patches.*the first visual_projection.weight"),
        (
            {"mps.cross_model.layers.1.1.fn.attn_out.weight": None},
            "cross_model.*missing, the first layers.1.1.attn_out",
        ),
        ({"mps.cross_model.layers.0.0.fn.to_q.weight": None}, "has no layers.0.0.fn.to_q.weight"),
        ({"mps.head.weight": torch.zeros(2)}, "the key mps.head.weight is of no part of it"),
        ({"mps.cross_model.layers.0.1.fn.ff_out.1.weight": torch.zeros(16, 9)}, r"shape \(16, 9\), where \(16, 64\)"),
    ],
)
def test_weights_of_something_else_name_the_first_key(change: dict, message: str, tmp_path: Path):
    make(tmp_path, {name: value for name, value in {**published(), **change}.items() if value is not None})
    with pytest.raises(UserError, match=f"mps: .*{message}") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_clip_alone_and_a_pickled_module_are_refused(tmp_path: Path):
    make(tmp_path, {name: value for name, value in published().items() if "cross_model" not in name})
    with pytest.raises(UserError, match=r"is no MPS: it has no keys cross_model\.\*"):
        load(tmp_path)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(UserError, match=r"MPS_overall_checkpoint\.pth is refused"):
        load(tmp_path / "MPS_overall_checkpoint.pth")


def test_without_weights_and_without_the_hub_it_is_one_line():
    with pytest.raises(UserError, match=r"mps: RE-N-Y/mpsv1, \S+, is no file or folder.*NAME=WEIGHTS"):
        load_scorer("mps")
