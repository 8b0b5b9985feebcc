"""Text-to-text and chat models as perturbers: what they are asked, and that rows are on their own."""

import pytest
from support.language import make_chat, make_t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from diffpref.errors import UserError
from diffpref.perturbers.base import PerturbOptions, identity, load_perturber

TEXTS = ["a red cat", "two dogs on the house, a cat", "small", "{prompt} of {x}"]
TEMPLATE = "change {share}: {prompt}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("writers")
    return {"t5": make_t5(root / "t5"), "chat": make_chat(root / "chat")}


def load(folder, **options):
    given = {"template": TEMPLATE, "max_new_tokens": 8} | options
    return load_perturber(PerturbOptions("transformers", model=str(folder), **given))


@pytest.mark.parametrize("name", ["t5", "chat"])
def test_at_temperature_0_it_is_what_transformers_gives(folders, name):
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    found = load(folders[name], temperature=0.0, level="strong", batch_size=3)(TEXTS, [0] * 4)
    for text, answer in zip(TEXTS, found, strict=True):
        asked = "change most: " + text
        if name == "t5":
            network, count = AutoModelForSeq2SeqLM.from_pretrained(folders[name]), 0
        else:
            network, asked = AutoModelForCausalLM.from_pretrained(folders[name]), f"<|user|>{asked}<|assistant|>"
            count = len(tokenizer(asked).input_ids)
        tokens = network.generate(**tokenizer(asked, return_tensors="pt"), do_sample=False, max_new_tokens=8)
        assert answer == " ".join(tokenizer.decode(tokens[0, count:], skip_special_tokens=True).split())


@pytest.mark.parametrize("name", ["t5", "chat"])
def test_a_batch_of_1_equals_a_batch_of_4(folders, name):
    together = load(folders[name], batch_size=4)(TEXTS, [1, 2, 3, 4])
    assert load(folders[name], batch_size=1)(TEXTS, [1, 2, 3, 4]) == together
    assert load(folders[name], batch_size=4)(TEXTS, [5, 6, 7, 8]) != together


@pytest.mark.parametrize(("level", "share"), [("weak", "one"), ("medium", "some"), ("strong", "most")])
def test_the_level_is_in_the_template(folders, monkeypatch, level, share):
    loaded, asked = load(folders["t5"], level=level), []
    call = type(loaded.tokenizer).__call__
    monkeypatch.setattr(
        type(loaded.tokenizer), "__call__", lambda self, texts, **how: asked.extend(texts) or call(self, texts, **how)
    )
    loaded(["a cat"], [1])
    assert asked == [f"change {share}: a cat"]


def test_templates(folders, capsys):
    with pytest.raises(UserError, match=r"^--template: it has no \{prompt\}, so that the model would not see the text"):
        load(folders["t5"], template="do {share}")
    with pytest.raises(UserError, match=r"^--template: unknown field \{x\}; there is \{prompt\} and \{share\}$"):
        load(folders["t5"], template="do {x}")
    identity(PerturbOptions("transformers", model=str(folders["t5"]), template="paraphrase: {prompt}"))
    assert capsys.readouterr().err.splitlines()[-1] == (
        "diffpref: warning: --template has no {share}, so that --level changes nothing"
    )
    with pytest.raises(UserError, match=r"^--model: the perturber 'transformers' needs a model"):
        load_perturber(PerturbOptions("transformers"))
