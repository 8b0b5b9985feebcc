"""Captions become the tokens that open_clip and transformers make of them."""

import hashlib
import json
from pathlib import Path

import pytest
from support.openclip import captions, pieces, symbols, write_tokenizer
from transformers import CLIPTokenizer

from diffpref.errors import UserError
from diffpref.scorers.parts.text import Tokens, clean, load_tokens

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "openclip.json").read_text(encoding="utf-8"))["tokens"]
START, END = len(symbols()), len(symbols()) + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("words"))


def rows(tokens: Tokens, texts: list[str]) -> list[list[int]]:
    """Tokens of each text up to the end that closes it."""
    found = []
    for row in tokens(texts).tolist():
        while len(row) > 1 and row[-1] == row[-2] == END:
            row.pop()
        found.append(row)
    return found


def closed(row: list[int]) -> list[int]:
    """A golden row in the same form: an end of the caption's own before the last one counts as one."""
    row = list(row)
    while len(row) > 1 and row[-1] == row[-2] == END:
        row.pop()
    return row


def test_cleaning():
    assert clean("  A  CafÃ©\n&amp;amp; “Bar” ") == 'a café & "bar"'
    assert clean("<b>&eacute;</b>") == "<b>é</b>"
    assert clean("") == ""


def test_the_pieces_that_tokenizers_disagree_about(folder: Path):
    tokens = load_tokens(str(folder), "x", 77, cleaned=True)
    for piece, row, expected in zip(pieces(), rows(tokens, pieces()), GOLDEN["pieces"], strict=True):
        assert row == closed(expected), piece


def digests(tokens: Tokens, texts: list[str]) -> list[str]:
    """Sums in the golden form, a thousand captions at a time."""
    made = [each.tolist() for each in (tokens(texts[start : start + 1000]) for start in range(0, len(texts), 1000))]
    sums = []
    for block, start in zip(made, range(0, len(texts), 1000), strict=True):
        lengths = [len(tokens([text])[0]) for text in texts[start : start + 1000]]
        cut = [row[:length] for row, length in zip(block, lengths, strict=True)]
        sums.append(hashlib.sha256(json.dumps(cut).encode()).hexdigest())
    return sums


def test_a_thousand_captions(folder: Path):
    tokens = load_tokens(str(folder), "x", 77, cleaned=True)
    assert digests(tokens, captions(1000)) == GOLDEN["sums"][:1]


@pytest.mark.slow
def test_ten_thousand_captions(folder: Path):
    tokens = load_tokens(str(folder), "x", 77, cleaned=True)
    assert digests(tokens, captions(10_000)) == GOLDEN["sums"]


def test_uncleaned_tokens_are_those_of_transformers(folder: Path):
    tokens = load_tokens(str(folder), "x", 77, cleaned=False)
    theirs = CLIPTokenizer.from_pretrained(folder)
    texts = captions(1000)
    expected = theirs(texts, truncation=True, max_length=77, padding=True, return_tensors="pt")["input_ids"]
    assert tokens(texts).tolist() == expected.tolist()


def test_cleaning_matters(folder: Path):
    cleaned, plain = (load_tokens(str(folder), "x", 77, cleaned=each) for each in (True, False))
    differ = sum(cleaned([text]).tolist() != plain([text]).tolist() for text in captions(300))
    assert differ > 50
    assert str(cleaned) != str(plain)


@pytest.mark.parametrize("cleaned", [True, False])
def test_long_captions_are_cut_with_their_end_kept(cleaned: bool, folder: Path):
    tokens = load_tokens(str(folder), "x", 10, cleaned=cleaned)
    (row,) = tokens(["a cat " * 50]).tolist()
    assert len(row) == 10
    assert (row[0], row[-1]) == (START, END)
    assert tokens(["a cat", "a " * 30]).shape == (2, 10)
    assert tokens([""]).tolist() == [[START, END]]
    assert tokens.end == END


def test_a_tokenizer_json_is_the_same_vocabulary(folder: Path, tmp_path: Path):
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    two, one = (load_tokens(str(place), "x", 77, cleaned=True) for place in (folder, tmp_path))
    assert two(captions(50)).tolist() == one(captions(50)).tolist()
    assert str(two) == str(one)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"a": 1}'])
def test_a_vocabulary_that_is_none_is_named(content: str, tmp_path: Path):
    write_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(UserError, match=r"x: .*vocab\.json is no CLIP vocabulary") as error:
        load_tokens(str(tmp_path), "x", 77, cleaned=True)
    assert "\n" not in str(error.value)
