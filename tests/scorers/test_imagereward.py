"""ImageReward: its own code's numbers, its tokens, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.blip import CAPTIONS, FULL_MED, filled, make_imagereward, med_config, vocabulary, write_vocabulary
from support.openclip import captions, picture, pieces

from diffpref.errors import UserError
from diffpref.scorers.base import Reward, load_scorer
from diffpref.scorers.parts import bert
from diffpref.scorers.parts.pixels import ClipPixels

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "imagereward.json").read_text(encoding="utf-8"))
PICTURES = [picture(*size) for size in GOLDEN["sizes"]]


def shapes(golden: dict[str, Any] = GOLDEN) -> dict[str, torch.Size]:
    return {name: torch.Size(shape) for name, shape in golden["shapes"].items()}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return filled(shapes(), GOLDEN["seed"])


@pytest.fixture(scope="module")
def folder(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_imagereward(tmp_path_factory.mktemp("imagereward") / "tiny", state)


def load(place: object, **options: Any) -> Reward:
    scorer = load_scorer(f"imagereward={place}", **options)
    assert isinstance(scorer, Reward)
    return scorer


def scores(scorer: Reward, texts: list[str]) -> torch.Tensor:
    return torch.tensor([[scorer([image], [text])[0] for text in texts] for image in PICTURES])


def test_golden_scores_of_the_official_code(folder: Path):
    expected = torch.tensor(GOLDEN["scores"])
    assert (expected.max() - expected.min()) > 0.1
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 1e-3
    assert scores(load(folder), CAPTIONS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_golden_scores_at_full_size(tmp_path: Path):
    golden = GOLDEN["full"]
    make_imagereward(tmp_path, filled(shapes(golden), GOLDEN["seed"]))
    (tmp_path / "med_config.json").write_text(json.dumps(med_config(FULL_MED)))
    scorer = load(tmp_path)
    assert "BLIP vision 1024x24/16, eps 1e-06, text 768x12/12" in scorer.identity["architecture"]
    assert scores(scorer, CAPTIONS[:2]) == pytest.approx(torch.tensor(golden["scores"]), abs=1e-4)


@pytest.mark.parametrize("change", [{"num_attention_heads": 8}, {"layer_norm_eps": 1e-2}, {"num_attention_heads": 12}])
def test_other_heads_or_norms_would_be_noticed(change: dict, folder: Path, tmp_path: Path):
    make_imagereward(tmp_path, torch.load(folder / "ImageReward.pt"))
    (tmp_path / "med_config.json").write_text(json.dumps(med_config() | change))
    off = (scores(load(tmp_path), CAPTIONS[:2]) - torch.tensor(GOLDEN["scores"])[:, :2]).abs().max()
    assert off > 1e-3


def test_tokens_are_those_of_the_official_tokenizer(folder: Path):
    tokens = bert.load_bert_tokens(str(folder), "x", 35)
    texts = [*pieces(), *captions(300)[-40:]]
    ids, mask = tokens(texts)
    differing = [text for text, row, ours in zip(texts, GOLDEN["tokens"], ids.tolist(), strict=True) if row != ours]
    assert not differing
    assert ids.shape == mask.shape == (len(texts), 35)
    assert torch.equal(mask.bool(), ids != 0)


def test_the_marks_that_blip_added_stand_at_the_end(folder: Path):
    tokens = bert.load_bert_tokens(str(folder), "x", 35)
    ids, _ = tokens(["[DEC] [ENC]"])
    count = len(vocabulary())
    assert ids[0, 1:3].tolist() == [count, count + 1]
    assert tokens.size == count + 2


def test_a_batch_of_32_scores_as_32_batches_of_one(folder: Path):
    scorer = load(folder)
    images = [picture(40 + 7 * number, 64 - number) for number in range(32)]
    prompts = captions(60)[28:]
    together = scorer(images, prompts)
    alone = [scorer([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in together}) > 20


def test_bf16_weights_end_in_fp32(folder: Path):
    full, half = load(folder), load(folder, precision="bf16")
    moved = (scores(full, CAPTIONS) - scores(half, CAPTIONS)).abs()
    assert 0 < moved.max() < 0.3  # of scores that spread by more than a whole
    assert any(torch.tensor(score).bfloat16().item() != score for score in half(PICTURES, CAPTIONS[:3]))
    assert full.version != half.version


def test_leftovers_are_dropped(state: dict[str, torch.Tensor], folder: Path, tmp_path: Path):
    leftover = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    make_imagereward(tmp_path, state | leftover)
    assert load(tmp_path)(PICTURES[:1], ["a cat"]) == load(folder)(PICTURES[:1], ["a cat"])
    assert any(name.startswith("blip.vision_proj.") for name in state)


def test_the_identity_tells_all_that_scores_depend_on(folder: Path):
    scorer = load(folder)
    assert scorer.prepare == ClipPixels("even", 224)
    told = scorer.identity
    assert told["weights"] == "ImageReward.pt"
    assert told["architecture"] == "BLIP vision 128x2/2, eps 1e-06, text 48x2/4"
    assert "35 tokens" in told["text"]
    assert "0.1671736" in told["formula"]


def test_a_file_takes_the_vocabulary_beside_it_or_the_one_named(folder: Path, tmp_path: Path):
    expected = load(folder)(PICTURES[:1], ["a cat"])
    assert load(folder / "ImageReward.pt")(PICTURES[:1], ["a cat"]) == expected
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert load(f"{tmp_path}={folder}")(PICTURES[:1], ["a cat"]) == expected
    with pytest.raises(UserError, match=r"imagereward: google-bert/bert-base-uncased, vocab\.txt, "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blip.visual_encoder.blocks.1.norm1.bias": None}, "1 keys missing.*layers.1.layer_norm1.bias"),
        ({"blip.text_encoder.extra": torch.zeros(2)}, "1 keys unexpected, the first extra"),
        ({"clip.logit_scale": torch.zeros(1)}, "the key clip.logit_scale is of no part of it"),
        ({"mlp.layers.4.bias": None}, "mlp.layers.4.bias is missing"),
        ({"mlp.layers.5.bias": torch.zeros(2)}, "mlp.layers.5.bias is unexpected"),
        ({"mlp.layers.7.weight": torch.zeros(2, 16), "mlp.layers.7.bias": torch.zeros(2)}, "gives 2 numbers"),
        ({"mlp.layers.0.weight": torch.zeros(1024, 40)}, r"mlp.layers.0.weight has the shape \(1024, 40\), where"),
        ({"blip.visual_encoder.pos_embed": None}, "pos_embed or .* is missing"),
    ],
)
def test_weights_of_something_else_name_the_first_key(
    change: dict, message: str, state: dict[str, torch.Tensor], tmp_path: Path
):
    merged = {name: value for name, value in {**state, **change}.items() if value is not None}
    make_imagereward(tmp_path, merged)
    with pytest.raises(UserError, match=rf"imagereward: .*ImageReward\.pt is no ImageReward: .*{message}") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_of_a_clip_are_refused(tmp_path: Path):
    torch.save({"visual.proj": torch.zeros(2)}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=r"is no ImageReward: the key visual\.proj is of no part of it"):
        load(tmp_path)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=r"ImageReward\.pt is refused"):
        load(tmp_path)


def test_what_is_beside_the_weights_must_fit_too(folder: Path, tmp_path: Path):
    make_imagereward(tmp_path, torch.load(folder / "ImageReward.pt"))
    (tmp_path / "vocab.txt").write_text("\n".join([*vocabulary(), "more"]))
    with pytest.raises(UserError, match=r"the vocabulary has \d+ words, the model \d+; name another"):
        load(tmp_path)
    (tmp_path / "vocab.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"vocab\.txt is no BERT vocabulary: it has no \[PAD\]"):
        load(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match="has no tokenizer: neither"):
        load(f"{tmp_path}={tmp_path}")
    write_vocabulary(tmp_path)
    (tmp_path / "med_config.json").write_text('{"hidden_size": "wide"}')
    with pytest.raises(UserError, match=r"med_config\.json cannot be read"):
        load(tmp_path)


def test_without_weights_and_without_the_hub_it_is_one_line():
    with pytest.raises(
        UserError, match=r"imagereward: THUDM/ImageReward, ImageReward\.pt, is no file.*NAME=WEIGHTS"
    ) as error:
        load_scorer("imagereward")
    assert not re.search("\n", str(error.value))
