"""Sampling by row: the right distribution, the row's own numbers, and the same text in any batch."""

import numpy as np
import pytest
import torch
from support.language import make_chat, make_t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.generation.logits_process import TopPLogitsWarper

from diffpref.draws import uniform
from diffpref.errors import UserError
from diffpref.language import RowSampler, check_template, in_batches, known_place, load_part, plain, write


def chosen(scores: torch.Tensor) -> list[int]:
    """The one token of each row that is left."""
    left = torch.isfinite(scores)
    assert (left.sum(-1) == 1).all()
    return scores.argmax(-1).tolist()


def drawn(logits: list[float], draws: range, **how: float) -> np.ndarray:
    sampler = RowSampler(draws, **how)
    scores = torch.tensor([logits]).expand(len(draws), -1)
    return np.bincount(chosen(sampler(torch.zeros(len(draws), 3, dtype=torch.long), scores)), minlength=len(logits))


def test_tokens_come_as_often_as_their_shares_say():
    logits = [0.0, 2.0, -1.0, 1.0, 1.5]
    count = 20_000
    shares = np.exp(np.array(logits) / 0.7)
    expected = count * shares / shares.sum()
    found = drawn(logits, range(count), temperature=0.7)
    assert ((found - expected) ** 2 / expected).sum() < 18.5  # chi-square of 4 degrees of freedom, 1 in 1000
    assert found.sum() == count


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.75, 0.9, 1.0])
def test_top_p_keeps_what_transformers_keeps(top_p):
    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
    kept = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), scores)
    kept = {place for place in range(40) if torch.isfinite(kept[0, place])}
    found = drawn(scores[0].tolist(), range(4000), top_p=top_p)
    assert set(np.flatnonzero(found)) <= kept
    likely = {place for place in kept if scores[0].softmax(-1)[place] > 0.01}
    assert likely <= set(np.flatnonzero(found))


def test_a_number_chooses_from_the_most_probable_token_on():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64))
    for draw in range(200):
        sampler = RowSampler([draw])
        for place in range(3):
            number = uniform(draw, f"token {place}")
            wanted = 1 if number < 0.5 else 2 if number < 0.8 else 0
            assert chosen(sampler(torch.zeros(1, 1, dtype=torch.long), logits)) == [wanted]


def test_temperature_0_leaves_the_scores():
    scores = torch.randn(2, 5)
    assert RowSampler([1, 2], temperature=0.0)(torch.zeros(2, 1, dtype=torch.long), scores) is scores


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_is_written_the_same_in_any_batch(tmp_path, temperature):
    folder = make_chat(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(folder)
    texts = ["a", "a cat on a red mat", "blue", "two dogs, and a house", "small", "x y z", "of the", "so it is"]

    def written(rows: list[int]) -> list[list[int]]:
        inputs = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
        tokens = write(network, inputs, RowSampler(rows, temperature, 0.9), max_new_tokens=12)
        end = tokenizer.eos_token_id
        return [[token for token in row if token != end] for row in tokens.tolist()]

    together = written(list(range(8)))
    assert len({tuple(row) for row in together}) == 8
    assert [row for number in range(8) for row in written([number])] == together
    assert written([3, 1, 6]) == [together[3], together[1], together[6]]


def test_the_inputs_are_cut_off_where_the_model_repeats_them_only(tmp_path):
    for make, kind in ((make_chat, AutoModelForCausalLM), (make_t5, AutoModelForSeq2SeqLM)):
        folder = make(tmp_path / kind.__name__)
        tokenizer, network = AutoTokenizer.from_pretrained(folder), kind.from_pretrained(folder)
        inputs = tokenizer(["a cat"], return_tensors="pt")
        plain_tokens = network.generate(**inputs, do_sample=False, max_new_tokens=5)
        found = write(network, inputs, RowSampler([0], temperature=0), max_new_tokens=5)
        start = inputs.input_ids.shape[1] if kind is AutoModelForCausalLM else 0
        assert torch.equal(found, plain_tokens[:, start:])


def test_batches_are_put_together_in_order():
    sizes = []

    def add(numbers: list[int], letters: list[str]) -> list[str]:
        sizes.append(len(numbers))
        return [f"{number}{letter}" for number, letter in zip(numbers, letters, strict=True)]

    assert in_batches(add, 2, [1, 2, 3], ["a", "b", "c"]) == ["1a", "2b", "3c"]
    assert sizes == [2, 1]
    assert in_batches(add, 2, [], []) == []


def test_plain():
    assert plain("  a\n\n cat\t sat ") == "a cat sat"


def test_templates():
    check_template("{{x}} {prompt}", ["prompt"])
    for template, message in {
        "{promt}": r"^--template: unknown field \{promt\}; there is \{prompt\}$",
        "{}": r"unknown field \{\}",
        "{prompt.__class__}": r"unknown field \{prompt.__class__\}",
        "{prompt[0]}": "unknown field",
        "{prompt": r"^--template: expected '}' before end of string; write \{\{ and \}\} for braces$",
    }.items():
        with pytest.raises(UserError, match=message):
            check_template(template, ["prompt"])


def test_places_of_models(tmp_path):
    assert known_place("owner/name", "it") == "owner/name"
    assert known_place(str(tmp_path), "it") == str(tmp_path)
    for place in ("./absent", "/no/such", "name", "a/b/c"):
        with pytest.raises(UserError, match=f"^--model: {place} is no folder and no hub id of the form owner/name$"):
            known_place(place, "it")
    with pytest.raises(UserError, match=r"^--tokenizer: it needs a model, a folder or a hub id"):
        known_place(None, "it", "--tokenizer")
    with pytest.raises(UserError, match=r"^--model: .* does not load as AutoTokenizer: "):
        load_part(AutoTokenizer, str(tmp_path))
