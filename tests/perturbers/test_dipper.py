"""DIPPER on a tiny T5 in its real folder format: what it is fed, letter by letter, and that rows are on their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.language import make_t5

from diffpref.draws import draw_seed, uniform
from diffpref.errors import UserError
from diffpref.perturbers import dipper
from diffpref.perturbers.base import PerturbOptions, load_perturber

CAPTIONS = [
    "a red cat on the house",
    "two dogs. A cat under the house! Is it small? A large dog. The end",
    "three cats",
    "A photo of Mr. Smith, e.g. in blue. 2 dogs.",
    "a cat. A dog. A house. A cat. A dog. A house. A photo",
    "blue, small",
    "large",
    "a dog of the house",
]


class Spy:
    """A tokenizer that notes the texts that it is given, and those that it gives."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.asked, self.written = tokenizer, [], []

    def __call__(self, texts, **how):
        self.asked.append(list(texts))
        return self.tokenizer(texts, **how)

    def batch_decode(self, tokens, **how):
        self.written.append(self.tokenizer.batch_decode(tokens, **how))
        return self.written[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_t5(tmp_path_factory.mktemp("t5") / "dipper")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(dipper, "MAX_LENGTH", 12)


def load(folder, **options):
    return load_perturber(PerturbOptions("dipper", model=str(folder), **options))


@pytest.mark.parametrize(("level", "code"), [("weak", 60), ("medium", 40), ("strong", 20)])
def test_what_the_model_reads(folder, short, level, code):
    loaded = load(folder, level=level)
    spied = replace(loaded, tokenizer=Spy(loaded.tokenizer))
    text = " A cat  sat.\nIt was red! Was it? A dog came. (No. 2 was late.)  It ran."
    (found,) = spied([text], [5])
    (first,), (second,) = spied.tokenizer.written
    start = f"lexical = {code}, order = 100 Paraphrase and perturb the following image caption."
    assert spied.tokenizer.asked == [
        [f"{start} <sent> A cat sat. It was red! Was it? </sent>"],
        [f"{start} {first} <sent> A dog came. (No. 2 was late.) It ran. </sent>"],
    ]
    assert len(first.split()) > 3 and found == " ".join(f"{first} {second}".split())


def test_the_settings_are_the_published_ones(folder, monkeypatch):
    loaded, given = load(folder), {}

    def generate(input_ids, **how):
        given.update(how)
        return torch.zeros((len(input_ids), 1), dtype=torch.long)

    monkeypatch.setattr(loaded.network, "generate", generate)
    loaded(["a cat"], [3])
    (sampler,) = given["logits_processor"]
    assert (given["max_length"], given["num_beams"], given["do_sample"]) == (256, 1, False)
    assert (sampler.top_p, sampler.temperature) == (0.75, 1.0)


def test_it_writes_at_most_256_tokens_with_the_start(folder):
    loaded = load(folder)
    loaded.network.generation_config.eos_token_id = None
    tokens = loaded.tokenizer(loaded(["a cat on the house"], [1])[0], add_special_tokens=False)["input_ids"]
    assert 100 < len(tokens) <= 255


def test_every_token_is_the_rows_own_draw(folder, short):
    """Token by token, with NumPy: the nucleus of 0.75, and the number of (row, window, token)."""
    loaded = load(folder)
    asked = "lexical = 40, order = 100 Paraphrase and perturb the following image caption. <sent> a red cat </sent>"
    inputs = loaded.tokenizer([asked], return_tensors="pt")
    decoder = [0]
    while len(decoder) < 12 and decoder[-1] != 1:
        logits = loaded.network(**inputs, decoder_input_ids=torch.tensor([decoder])).logits[0, -1].double().numpy()
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        order = np.argsort(-shares, kind="stable")
        kept = order[: int(np.searchsorted(np.cumsum(shares[order]), 0.75)) + 1]
        number = uniform(draw_seed(17, "window", 0), f"token {len(decoder) - 1}")
        sums = np.cumsum(shares[kept])
        decoder.append(int(kept[np.searchsorted(sums, number * sums[-1], side="right")]))
    wanted = loaded.tokenizer.decode(decoder, skip_special_tokens=True)
    assert loaded(["a red cat"], [17]) == [" ".join(wanted.split())]


def test_a_batch_of_1_equals_a_batch_of_8(folder, short):
    draws = list(range(100, 108))
    together = load(folder, batch_size=8)(CAPTIONS, draws)
    assert len(set(together)) == 8
    alone = load(folder, batch_size=1)
    assert alone(CAPTIONS, draws) == together
    assert load(folder, batch_size=3)(CAPTIONS[::-1], draws[::-1]) == together[::-1]
    assert alone(CAPTIONS[:2], [1, 2]) != together[:2]
    assert load(folder, batch_size=8, level="strong")(CAPTIONS, draws) != together


def test_nothing_to_do(folder):
    assert load(folder)([], []) == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a cat", ["a cat"]),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. Who met Mrs. Smith at 8.30. They left.", ["Dr. Who met Mrs. Smith at 8.30.", "They left."]),
        ("by J. R. R. Tolkien. Good", ["by J. R. R. Tolkien.", "Good"]),
        ("a cat. a dog. A cow.", ["a cat. a dog.", "A cow."]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("cats, e.g. Persian ones. (All white.) 3 dogs", ["cats, e.g. Persian ones.", "(All white.)", "3 dogs"]),
        ("What?! No... Yes.", ["What?!", "No...", "Yes."]),
        ("  a\n b.  C ", ["a b.", "C"]),
        ("...", ["..."]),
        ("", []),
        ("猫が歩く。犬も歩く。", ["猫が歩く。犬も歩く。"]),
    ],
)
def test_sentences(text, wanted):
    assert dipper.sentences(text) == wanted


def test_windows_of_three():
    assert dipper.windows("A. B! Cc. Dd. Ee.") == ["A. B! Cc. Dd.", "Ee."]  # A. is an initial
    assert dipper.windows("Aa. Bb. Cc. Dd. Ee. Ff. Gg.") == ["Aa. Bb. Cc.", "Dd. Ee. Ff.", "Gg."]


def test_the_tokenizer_is_the_folders_own_or_a_given_one(folder, tmp_path):
    bare = tmp_path / "bare"
    load(folder).network.save_pretrained(bare)
    with pytest.raises(UserError, match=r"^--tokenizer: google/t5-v1_1-xxl does not load as AutoTokenizer: "):
        load(bare)  # no network here
    found = load(bare, tokenizer=str(folder))
    assert found(["a cat"], [1]) == load(folder)(["a cat"], [1])
    with pytest.raises(UserError, match=r"^--template: the perturber 'dipper' has no such option; it takes: --level"):
        load(folder, template="{prompt}")
