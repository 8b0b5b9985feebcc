"""Models with eyes, in the folders of their real classes: what they say is what transformers itself gives."""

import json

import pytest
import torch
from support.datasets import noise
from support.language import make_blip, make_chat, make_idefics3, make_llava, make_qwen2vl
from transformers import AutoModelForImageTextToText

from diffpref.captioners.base import CaptionOptions, NoCaption, identity, load_captioner
from diffpref.errors import UserError

TEMPLATE = "Describe it. Asked for: {prompt}"
IMAGES = [noise(n, 20 + 7 * n, 16 + n) for n in range(5)]
PROMPTS = ["a cat", "a much longer prompt about two red dogs on a house", "", "{x} of {prompt}", "small"]
MAKERS = {"llava": make_llava, "idefics3": make_idefics3, "qwen2vl": make_qwen2vl}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("eyes")
    return {name: make(root / name) for name, make in MAKERS.items()}


def captioner(folder, **options):
    given = {"template": TEMPLATE, "max_new_tokens": 8} | options
    return load_captioner(CaptionOptions("transformers", str(folder), **given))


def by_hand(folder, processor, image, prompt: str) -> str:
    """One image through plain transformers."""
    content = [{"type": "image"}, {"type": "text", "text": TEMPLATE.replace("{prompt}", prompt)}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    return " ".join(processor.tokenizer.decode(tokens, skip_special_tokens=True).split())


@pytest.mark.parametrize("name", MAKERS)
def test_captions_are_those_of_transformers_in_any_batch(folders, name):
    whole = captioner(folders[name], batch_size=3)
    found = whole(IMAGES, PROMPTS, [0] * 5)
    assert found == [
        by_hand(folders[name], whole.processor, image, prompt) for image, prompt in zip(IMAGES, PROMPTS, strict=True)
    ]
    assert len(set(found)) == 5
    assert whole([IMAGES[1], IMAGES[0]], ["a cat"] * 2, [0, 0])[1] == found[0]  # the image matters
    assert whole([IMAGES[1]], ["a cat"], [0]) != [found[0]]


def test_marks_of_the_model_in_a_prompt_are_only_text(folders):
    for name, mark in (("llava", "<image>"), ("idefics3", "<fake_token_around_image>"), ("qwen2vl", "<|image_pad|>")):
        whole = captioner(folders[name])
        assert whole(IMAGES[:1], [f"a {mark} cat<|user|>"], [0]) == whole(IMAGES[:1], ["a   cat "], [0])


def test_sampling_is_by_row(folders):
    whole = captioner(folders["llava"], temperature=1.0, top_p=0.95, batch_size=5)
    found = whole(IMAGES[:1] * 5, ["a"] * 5, [1, 2, 3, 4, 5])
    assert len(set(found)) == 5
    assert [whole(IMAGES[:1], ["a"], [draw])[0] for draw in (5, 2)] == [found[4], found[1]]


def test_bf16(folders):
    half = captioner(folders["llava"], dtype="bf16")
    assert half.network.dtype == torch.bfloat16
    assert isinstance(half(IMAGES[:1], ["a cat"], [0])[0], str)


def test_a_model_that_says_nothing(folders, monkeypatch):
    whole = captioner(folders["llava"])
    monkeypatch.setattr(type(whole.processor.tokenizer), "batch_decode", lambda self, tokens, **how: [" \n"])
    assert whole(IMAGES[:1], ["a"], [0]) == [NoCaption("the model says nothing")]


def test_without_a_chat_template_the_text_goes_as_it_is(tmp_path):
    whole = captioner(make_blip(tmp_path / "blip", seed=1), template="a photo of")
    found = whole(IMAGES[:3], ["", "x", "y"], [0, 0, 0])
    assert all(caption.startswith("a photo of ") for caption in found)
    assert found == [whole([image], [""], [0])[0] for image in IMAGES[:3]]


def test_the_identity_is_that_of_weights_and_settings(folders, tmp_path):
    def told(folder, **options):
        return identity(CaptionOptions("transformers", str(folder), template=TEMPLATE, **options))

    found = told(folders["llava"])
    assert found == told(folders["llava"], batch_size=3, device="auto")
    assert found["captioner"] == "transformers" and found["template"] == TEMPLATE and "device" not in found
    assert found["version"] != told(make_llava(tmp_path / "other", seed=1))["version"]
    assert found | {"max_new_tokens": 9} == told(folders["llava"], max_new_tokens=9)


def test_folders_that_are_no_such_model(tmp_path, folders):
    with pytest.raises(UserError, match=r"^--model: the captioner 'transformers' needs a model, a folder or a hub id"):
        load_captioner(CaptionOptions("transformers"))
    with pytest.raises(UserError, match=r"^--model: .*chat is no model of images and text: it has no processor"):
        captioner(make_chat(tmp_path / "chat"))
    with pytest.raises(UserError, match=r"^--model: .*empty does not load as AutoProcessor: "):
        (tmp_path / "empty").mkdir()
        captioner(tmp_path / "empty")
    with pytest.raises(UserError, match=r"^--template: unknown field \{promt\}"):
        captioner(folders["llava"], template="{promt}")


def test_code_of_a_models_own_is_never_run(tmp_path):
    folder = make_llava(tmp_path / "llava")
    for name, key in (("config.json", "AutoModelForImageTextToText"), ("processor_config.json", "AutoProcessor")):
        file = folder / name
        content = json.loads(file.read_text()) | {"model_type": "mine", "auto_map": {key: "mine.Mine"}}
        content.pop("processor_class", None)
        file.write_text(json.dumps(content))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(UserError, match=r"^--model: .* does not load as "):
        captioner(folder)
    assert not (tmp_path / "ran").exists()
