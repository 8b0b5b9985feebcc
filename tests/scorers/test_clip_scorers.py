"""The scorers that are a cosine of CLIP's features: PickScore, HPSv2, HPSv2.1 and both CLIP scores."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.clip import config, make_clip
from support.openclip import VISION, captions, picture, tiny_state, wave, write_tokenizer

from diffpref.errors import UserError
from diffpref.scorers.aesthetic_v1 import AESTHETIC_V1
from diffpref.scorers.aesthetic_v2 import AESTHETIC_V2
from diffpref.scorers.base import Reward, identity_of, load_scorer, scorer_names
from diffpref.scorers.parts.clip import KNOWN, VIT_H, VIT_L, Clip, load_clip
from diffpref.scorers.parts.openclip import from_open_clip
from diffpref.scorers.parts.pixels import ClipPixels, PaddedPixels

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "openclip.json").read_text(encoding="utf-8"))["features"]
SIDE = VISION["image_size"]
NAMES = ["pickscore", "hpsv2", "hpsv2.1", "clip-h", "clip-l"]
FILES = ("model.safetensors", "weights.pt")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "gelu")


def load(name: str, weights: object, **options: Any) -> Reward:
    scorer = load_scorer(f"{name}={weights}", **options)
    assert isinstance(scorer, Reward)
    return scorer


def clip_of(folder: Path, precision: Any = "fp32") -> Clip:
    return load_clip(str(folder), FILES, None, {}, "x", "cpu", precision)


def images(count: int) -> list[Image.Image]:
    return [picture(40 + 7 * number, 64 - number) for number in range(count)]


def test_all_are_found():
    assert {*NAMES, "aesthetic-v1", "aesthetic-v2", "embedded-judge"} <= set(scorer_names())
    assert "parts" not in scorer_names()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_golden_features_of_open_clip(act: str, file: str, tmp_path: Path):
    folder = make_clip(tmp_path, act, file)
    clip = clip_of(folder)
    tokens = load("clip-h", folder / file)  # loads the tokenizer too
    prepared = list(wave((2, 3, SIDE, SIDE), 3) * 2)
    expected = {kind: torch.tensor(GOLDEN[act][kind]) for kind in ("images", "texts", "cosines")}
    assert clip.features(prepared) == pytest.approx(expected["images"], abs=1e-5)
    for place, caption in enumerate(GOLDEN["captions"]):
        cosines = tokens.measure(prepared, [caption] * 2)
        assert cosines == pytest.approx(expected["cosines"][:, place], abs=1e-6)
    other = "gelu" if act == "quick_gelu" else "quick_gelu"
    assert clip.features(prepared) != pytest.approx(torch.tensor(GOLDEN[other]["images"]), abs=1e-4)


def test_features_are_projected_once(folder: Path):
    """transformers 5 gives the projected features under the name that once was that of the unprojected ones."""
    clip = clip_of(folder)
    prepared = list(wave((2, 3, SIDE, SIDE), 3))
    network = clip.network
    pooled = network.vision_model(torch.stack(prepared)).pooler_output
    assert clip.features(prepared) == pytest.approx(pooled @ network.visual_projection.weight.T, abs=1e-5)
    ids = torch.tensor([[0, 5, 9, network.text_model.eos_token_id]])
    pooled = network.text_model(ids).pooler_output @ network.text_projection.weight.T
    assert clip.texts(ids) == pytest.approx(pooled / pooled.norm(), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "factor", "prepare"),
    [
        ("pickscore", 100.0, ClipPixels("floor", SIDE)),
        ("hpsv2", 100.0, PaddedPixels(SIDE)),
        ("hpsv2.1", 100.0, PaddedPixels(SIDE)),
        ("clip-h", 1.0, PaddedPixels(SIDE)),
        ("clip-l", 1.0, ClipPixels("even", SIDE)),
    ],
)
def test_a_score_is_a_factor_times_the_cosine(name: str, factor: float, prepare: Any, tmp_path: Path):
    folder = make_clip(tmp_path, state={**tiny_state(), "logit_scale": torch.tensor(factor).log()})
    scorer = load(name, folder)
    assert scorer.prepare == prepare
    assert scorer.name == name
    (image,) = images(1)
    clip, caption = clip_of(folder), "a photo of the cat"
    tokens = torch.tensor([json.loads((folder / "vocab.json").read_text())[each] for each in TOKENS])[None]
    cosine = float((clip.images([prepare(image)]) * clip.texts(tokens)).sum())
    assert abs(cosine) > 0.05
    assert scorer([image], [caption]) == pytest.approx([factor * cosine], rel=1e-5)


TOKENS = ["<|startoftext|>", "a</w>", "photo</w>", "of</w>", "the</w>", "cat</w>", "<|endoftext|>"]


def test_only_pickscore_takes_the_logit_scale_of_its_weights(folder: Path, tmp_path: Path):
    half = make_clip(tmp_path, state={**tiny_state(), "logit_scale": torch.tensor(50.0).log()})
    image, caption = images(1), ["a red dog"]
    for name in NAMES:
        ratio = load(name, half)(image, caption)[0] / load(name, folder)(image, caption)[0]
        assert ratio == pytest.approx(0.5 if name == "pickscore" else 1.0, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_32_scores_as_32_batches_of_one(name: str, folder: Path):
    scorer = load(name, folder)
    given, prompts = images(32), captions(60)[28:]
    together = scorer(given, prompts)
    alone = [scorer([image], [prompt])[0] for image, prompt in zip(given, prompts, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-5)  # a hundred has eight digits in fp32
    assert len({round(score, 4) for score in together}) > 20


def test_bf16_weights_move_pickscore_little_for_the_last_step_is_fp32(folder: Path):
    given, prompts = images(16), captions(60)[44:]
    full, half = (load("pickscore", folder, precision=each) for each in ("fp32", "bf16"))
    moved = [abs(ours - theirs) for ours, theirs in zip(full(given, prompts), half(given, prompts), strict=True)]
    scores = half(given, prompts)
    assert max(moved) > 0
    assert any(torch.tensor(score).bfloat16().item() != score for score in scores)  # no rounding at the end
    clips = [clip_of(folder, each) for each in ("fp32", "bf16")]
    assert [clip.network.dtype for clip in clips] == [torch.float32, torch.bfloat16]
    assert clips[0].logit_scale == clips[1].logit_scale
    assert full.version != half.version
    prepared = [full.prepare(image) for image in given]
    units = [clip.images(prepared) for clip in clips]
    assert units[1].dtype == torch.float32
    assert torch.allclose(units[1].norm(dim=-1), torch.ones(16), atol=1e-6)


def test_images_of_one_batch_go_through_the_network_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = load("hpsv2", folder), load("hpsv2.1", folder)
    clip = clip_of(folder)
    seen: list[int] = []
    original = clip.network.get_image_features

    def counted(pixels: torch.Tensor) -> Any:
        seen.append(len(pixels))
        return original(pixels)

    monkeypatch.setattr(clip.network, "get_image_features", counted)
    prepared = [first.prepare(image) for image in images(3)]
    prompts = ["a cat", "a dog", "a sky"]
    assert torch.equal(first.measure(prepared, prompts), second.measure(list(prepared), prompts))
    assert seen == [3]
    first.measure(prepared[:2], prompts[:2])
    second.measure([each.clone() for each in prepared[:2]], prompts[:2])
    assert seen == [3, 2, 2]


def test_the_identity_tells_all_that_scores_depend_on(folder: Path):
    scorer = load("hpsv2", folder)
    told = identity_of(scorer)
    assert told["scorer"] == "hpsv2"
    assert told["version"] == scorer.version
    assert told["weights"] == "model.safetensors"
    assert len(told["sha256"]) == 64
    assert told["precision"] == "fp32"
    for part, words in {
        "architecture": ["patches of 8 in 32", "32x2/2", "24x2/2", "shared 16", "gelu"],
        "preprocessing": ["bicubic on floats, antialias", "longer side 32"],
        "text": ["open_clip cleaning", "ftfy", "77 tokens"],
        "formula": ["100 x cosine"],
    }.items():
        assert all(word in told[part] for word in words)
    assert load("pickscore", folder).identity["formula"].startswith("logit scale x cosine")
    assert len({load(name, folder).version for name in ("hpsv2", "clip-h", "clip-l", "pickscore")}) == 4


def test_the_version_follows_the_content_and_not_the_place(folder: Path, tmp_path: Path):
    same = make_clip(tmp_path / "same")
    other = make_clip(tmp_path / "other", state={**tiny_state(), "logit_scale": torch.tensor(4.0)})
    assert load("hpsv2", same).version == load("hpsv2", folder).version != load("hpsv2", other).version
    longer = write_tokenizer(tmp_path / "words")
    with (longer / "merges.txt").open("a") as file:
        file.write("x z\n")
    vocabulary = json.loads((longer / "vocab.json").read_text())
    (longer / "vocab.json").write_text(json.dumps({**vocabulary, "xz": len(vocabulary)}))
    assert load("hpsv2", f"{folder}={longer}").version != load("hpsv2", folder).version


def test_a_file_takes_the_tokenizer_beside_it_or_the_one_named(folder: Path, tmp_path: Path):
    image, prompt = images(1), ["a photo of the cat"]
    expected = load("hpsv2", folder)(image, prompt)
    assert load("hpsv2", folder / "model.safetensors")(image, prompt) == expected
    lonely = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": tiny_state()}, lonely)
    (tmp_path / "config.json").write_text(json.dumps(config()))
    assert load("hpsv2", f"{lonely}={folder}")(image, prompt) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match=r"hpsv2: laion/CLIP-ViT-H.*, vocab\.json, .*could not be fetched"):
        load("hpsv2", lonely)


def test_a_folder_without_a_tokenizer_names_the_missing_files(tmp_path: Path):
    folder = make_clip(tmp_path)
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: merges\.txt missing, and no tokenizer\.json.*=TOKENIZER"):
        load("pickscore", folder)


@pytest.mark.parametrize("name", NAMES)
def test_without_weights_and_without_the_hub_it_is_one_line(name: str):
    with pytest.raises(
        UserError, match=rf"{name}: \S+/\S+, \S+, is no file or folder.*HF_HUB_OFFLINE.*NAME=WEIGHTS"
    ) as error:
        load_scorer(name)
    assert "\n" not in str(error.value)


def test_published_weights_in_the_hubs_cache_need_no_configuration(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    repository = tmp_path / "models--some--body"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / FILES[0]).write_bytes((folder / FILES[0]).read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    standard = {key: value for key, value in config().items() if key != "model_type"}
    cached = load_clip("some/body", FILES, standard, {}, "x", "cpu", "fp32")
    prepared = list(wave((1, 3, SIDE, SIDE), 3))
    assert torch.equal(cached.features(prepared), clip_of(folder).features(prepared))
    with pytest.raises(UserError, match=r"x: some/body, config\.json, .*not in the hub's cache"):
        load_clip("some/body", FILES, None, {}, "x", "cpu", "fp32")
    (snapshot / "config.json").write_text(json.dumps(config()))
    asked = load_clip("some/body", FILES, None, {}, "x", "cpu", "fp32")
    assert torch.equal(asked.features(prepared), cached.features(prepared))


def spoilt(change: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    merged = {**from_open_clip(tiny_state()), **change}
    return {name: value.contiguous().clone() for name, value in merged.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_model.post_layernorm.bias": None}, "1 keys missing, the first vision_model.post_layernorm.bias"),
        ({"visual.extra": torch.zeros(3)}, "1 keys unexpected, the first visual.extra"),
        ({"logit_scale": torch.zeros(2)}, r"logit_scale has the shape \(2,\), where \(\) is expected"),
        (
            {"text_model.encoder.layers.1.mlp.fc1.weight": torch.zeros(90, 24)},
            r"text_model.encoder.layers.1.mlp.fc1.weight has the shape \(90, 24\), where \(96, 24\) is expected",
        ),
    ],
)
def test_weights_of_another_architecture_name_the_first_key(change: Any, message: str, tmp_path: Path):
    folder = make_clip(tmp_path)
    save_file(spoilt(change), folder / "model.safetensors")
    with pytest.raises(UserError, match=f"pickscore: .*does not fit CLIP patches of 8.*{message}") as error:
        load("pickscore", folder)
    assert "\n" not in str(error.value)


def test_weights_alone_must_be_of_the_published_architecture(tmp_path: Path):
    torch.save({"state_dict": tiny_state()}, tmp_path / "tiny.pt")
    with pytest.raises(UserError, match="does not fit CLIP patches of 14 in 224, vision and text 1280x32/16"):
        load("hpsv2", tmp_path / "tiny.pt")


def test_leftover_buffers_of_positions_are_dropped(folder: Path, tmp_path: Path):
    old = make_clip(tmp_path)
    state = load_file(old / "model.safetensors")
    leftovers = {f"{tower}_model.embeddings.position_ids": torch.arange(77)[None] for tower in ("text", "vision")}
    save_file(state | leftovers, old / "model.safetensors")
    image, prompt = images(1), ["a cat"]
    assert load("pickscore", old)(image, prompt) == load("pickscore", folder)(image, prompt)


def test_a_configuration_that_is_damaged_or_of_something_else(tmp_path: Path):
    folder = make_clip(tmp_path)
    (folder / "config.json").write_text('{"model_type": "clip", "projection_dim": "wide"}')
    with pytest.raises(UserError, match=r"pickscore: .*config\.json is no configuration of a CLIP model") as error:
        load("pickscore", folder)
    assert "\n" not in str(error.value)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="does not fit CLIP patches of 14"):
        load("pickscore", folder)


def test_the_published_architectures_have_their_known_numbers_of_weights():
    from accelerate import init_empty_weights
    from transformers import CLIPConfig, CLIPModel

    for standard, millions in ((VIT_H, 986.11), (VIT_L, 427.62)):
        with init_empty_weights():
            network = CLIPModel(CLIPConfig(**standard))
        assert sum(each.numel() for each in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_known_sums_are_sums():
    known = {**KNOWN, **AESTHETIC_V1.known, **AESTHETIC_V2.known}
    assert len(known) == 4 and all(len(total) == 64 and int(total, 16) for total in known)


def test_a_prompt_of_ten_thousand_characters(folder: Path):
    scorer = load("hpsv2", folder)
    long: Sequence[str] = ["cat " * 2500, "猫" * 10_000, "\ud800 half", ""]
    for name in ("hpsv2", "pickscore"):
        scorer = load(name, folder)
        assert all(torch.isfinite(torch.tensor(scorer(images(4), list(long)))))
