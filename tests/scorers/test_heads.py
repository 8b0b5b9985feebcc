"""Linear heads on CLIP's features: both aesthetic predictors, and files of one's own."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.clip import config, make_clip
from support.openclip import EMBED, VISION, picture, tiny_state, wave, write_tokenizer
from torch import nn

from diffpref.errors import UserError
from diffpref.scorers.base import Reward, load_scorer
from diffpref.scorers.parts.clip import load_clip
from diffpref.scorers.parts.heads import read_head
from diffpref.scorers.parts.pixels import ClipPixels

V2 = "sac+logos+ava1-l14-linearMSE.pth"
V1 = "sa_0_4_vit_l_14_linear.pth"
SIDE = VISION["image_size"]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP: features of width 16."""
    return make_clip(tmp_path_factory.mktemp("clip") / "narrow")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP with features as wide as ViT-L/14's, which the aesthetic heads expect."""
    folder = tmp_path_factory.mktemp("clip") / "wide"
    state = tiny_state() | {"visual.proj": wave((VISION["width"], 768), 1), "text_projection": wave((24, 768), 2)}
    make_clip(folder, state=state)
    (folder / "config.json").write_text(json.dumps(config() | {"projection_dim": 768}))
    return folder


def published(widths: list[int], dropouts: set[int]) -> nn.Sequential:
    """The published module: its layers have numbers with gaps where the dropouts are."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for place, (given, out) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Linear(given, out))
            if place in dropouts:
                layers.append(nn.Dropout(0.2))
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    second = published([768, 1024, 128, 64, 16, 1], {0, 1, 2})
    torch.save({f"layers.{name}": value for name, value in second.state_dict().items()}, folder / V2)
    torch.save(published([768, 1], set())[0].state_dict(), folder / V1)
    return folder


def load(wanted: str, **options: Any) -> Reward:
    scorer = load_scorer(wanted, **options)
    assert isinstance(scorer, Reward)
    return scorer


IMAGES = [picture(40 + 9 * number, 61) for number in range(32)]
PROMPTS = [f"prompt {number}" for number in range(32)]


@pytest.mark.parametrize(("name", "file"), [("aesthetic-v1", V1), ("aesthetic-v2", V2)])
def test_the_head_is_the_published_module_on_normalised_features(name: str, file: str, wide: Path, heads: Path):
    scorer = load(f"{name}={heads / file}={wide}")
    assert scorer.prepare == ClipPixels("even", SIDE)
    clip = load_clip(str(wide), ["model.safetensors"], None, {}, "x", "cpu", "fp32")
    features = clip.features([scorer.prepare(image) for image in IMAGES])
    assert features.shape == (32, 768)
    module = published([768, 1], set()) if name == "aesthetic-v1" else published([768, 1024, 128, 64, 16, 1], {0, 1, 2})
    with torch.no_grad():
        expected = module(nn.functional.normalize(features, dim=-1))[:, 0].tolist()
    assert scorer(IMAGES, PROMPTS) == pytest.approx(expected, abs=1e-5)
    assert len({round(each, 6) for each in expected}) > 16
    assert scorer(IMAGES, PROMPTS[::-1]) == scorer(IMAGES, PROMPTS)
    alone = [scorer([image], [""])[0] for image in IMAGES]
    assert scorer(IMAGES, PROMPTS) == pytest.approx(alone, abs=1e-5)


def test_the_numbers_of_the_layers_are_those_of_the_published_file(heads: Path):
    names = torch.load(heads / V2, weights_only=True)
    assert {int(name.split(".")[1]) for name in names} == {0, 2, 4, 6, 7}
    assert read_head(heads / V2, "x").widths == (768, 1024, 128, 64, 16, 1)
    assert read_head(heads / V1, "x").widths == (768, 1)


def test_both_predictors_and_the_clip_score_share_one_pass(wide: Path, heads: Path, monkeypatch: pytest.MonkeyPatch):
    scorers = [load(f"{name}={heads}={wide}") for name in ("aesthetic-v1", "aesthetic-v2")]
    scorers.append(load(f"clip-l={wide}"))
    assert len({scorer.prepare for scorer in scorers}) == 1
    clip = load_clip(str(wide), ["model.safetensors"], None, {}, "x", "cpu", "fp32")
    seen: list[int] = []
    original = clip.network.get_image_features

    def counted(pixels: torch.Tensor) -> Any:
        seen.append(len(pixels))
        return original(pixels)

    monkeypatch.setattr(clip.network, "get_image_features", counted)
    for start in (0, 4):
        prepared = [scorers[0].prepare(image) for image in IMAGES[start : start + 4]]
        for scorer in scorers:
            scorer.measure(prepared, PROMPTS[:4])
    assert seen == [4, 4]


def test_a_folder_may_hold_both(wide: Path, heads: Path, tmp_path: Path):
    both = tmp_path / "both"
    both.mkdir()
    for file in (heads / V2, wide / "model.safetensors", wide / "config.json"):
        (both / file.name).write_bytes(file.read_bytes())
    apart = load(f"aesthetic-v2={heads / V2}={wide}")
    assert load(f"aesthetic-v2={both}")(IMAGES[:1], [""]) == apart(IMAGES[:1], [""])
    assert load(f"aesthetic-v2={both}").version == apart.version


def test_the_identity_has_both_sums(wide: Path, heads: Path):
    told = load(f"aesthetic-v2={heads}={wide}").identity
    assert told["head"] == V2
    assert told["sha256"] != told["head sha256"]
    assert {len(told["sha256"]), len(told["head sha256"])} == {64}
    assert told["formula"].startswith("linear layers 768-1024-128-64-16-1 on normalised")
    assert "shorter side 32" in told["preprocessing"]


def test_without_weights_it_is_one_line(heads: Path):
    with pytest.raises(UserError, match=r"aesthetic-v1: .*LAION-AI/aesthetic-predictor.*aesthetic-v1=FILE"):
        load_scorer("aesthetic-v1")
    with pytest.raises(UserError, match=r"aesthetic-v2: .*could not be fetched"):
        load_scorer("aesthetic-v2")
    with pytest.raises(UserError, match=r"aesthetic-v2: openai/clip-vit-large-patch14, \S+, .*could not be fetched"):
        load_scorer(f"aesthetic-v2={heads}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, r"widths \(5, 1\), where \(768, 1\) are expected"),
        ({"weight": torch.zeros(2, 768), "bias": torch.zeros(2)}, "of one output: it has 2"),
        ({"weight": torch.zeros(1, 768)}, "layer 0 needs a weight and a bias"),
        ({"fc.scale": torch.zeros(1)}, "fc.scale is neither a weight nor a bias"),
        (
            {f"{n}.{k}": torch.zeros(*s) for n, k, s in [(0, "weight", (4, 768)), (0, "bias", (4,))]}
            | {"2.weight": torch.zeros(1, 3), "2.bias": torch.zeros(1)},
            r"weight 2 has the shape \(1, 3\)",
        ),
    ],
)
def test_a_head_of_another_shape_names_the_key(content: dict, message: str, tmp_path: Path):
    torch.save(content, tmp_path / V1)
    with pytest.raises(UserError, match=f"aesthetic-v1: .*{message}"):
        load_scorer(f"aesthetic-v1={tmp_path / V1}")


def own(file: Path, metadata: dict[str, str] | None, width: int = EMBED) -> torch.Tensor:
    weight = wave((1, width), 5)
    save_file({"weight": weight, "bias": torch.tensor([0.25])}, file, metadata=metadata)
    return weight


@pytest.mark.parametrize("normalize", ["true", "false"])
def test_a_head_of_ones_own(normalize: str, narrow: Path, tmp_path: Path):
    file = tmp_path / "mine.safetensors"
    weight = own(file, {"clip": str(narrow), "normalize": normalize})
    scorer = load(str(file))
    assert scorer.name == "mine"
    clip = load_clip(str(narrow), ["model.safetensors"], None, {}, "x", "cpu", "fp32")
    features = clip.features([scorer.prepare(image) for image in IMAGES[:3]])
    if normalize == "true":
        features = features / features.norm(dim=-1, keepdim=True)
    assert scorer(IMAGES[:3], PROMPTS[:3]) == pytest.approx((features @ weight[0] + 0.25).tolist(), abs=1e-5)


def test_a_head_of_ones_own_takes_another_clip(narrow: Path, tmp_path: Path):
    file = tmp_path / "mine.safetensors"
    own(file, None)
    with pytest.raises(UserError, match=r"mine\.safetensors: its metadata do not tell `clip`; .*=CLIP"):
        load_scorer(str(file))
    other = load(f"{file}={narrow}")
    own(file, {"clip": "nobody/nothing"})
    assert load(f"{file}={narrow}")(IMAGES[:2], ["", ""]) == other(IMAGES[:2], ["", ""])
    with pytest.raises(UserError, match=r"mine: nobody/nothing, \S+, .*could not be fetched"):
        load_scorer(str(file))


def test_what_is_wrong_with_a_head_of_ones_own(narrow: Path, tmp_path: Path):
    file = tmp_path / "mine.safetensors"
    with pytest.raises(UserError, match="there is no such file"):
        load_scorer(str(file))
    own(file, {"clip": str(narrow), "normalize": "yes"})
    with pytest.raises(UserError, match="`normalize` of its metadata is 'yes'"):
        load_scorer(str(file))
    own(file, {"clip": str(narrow)}, width=12)
    with pytest.raises(UserError, match="features of width 12; the CLIP has 16"):
        load_scorer(str(file))
    file.write_bytes(b"not tensors")
    with pytest.raises(UserError, match=r"mine\.safetensors cannot be read as weights"):
        load_scorer(str(file))
    known = tmp_path / "hpsv2.safetensors"
    own(known, {"clip": str(narrow)})
    with pytest.raises(UserError, match="would be called hpsv2, as one of diffpref's is"):
        load_scorer(str(known))
    bare = tmp_path / "bare"
    write_tokenizer(bare)
    (bare / "model.safetensors").write_bytes((narrow / "model.safetensors").read_bytes())
    own(file, {"clip": str(bare)})
    with pytest.raises(UserError, match=r"has no config\.json of a CLIP model beside it"):
        load_scorer(str(file))
