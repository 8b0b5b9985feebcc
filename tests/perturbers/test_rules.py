"""The rules: which words are exchanged for which, how many, and when a text stays as it was."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpref.embedded import world
from diffpref.embedded.world import read_caption
from diffpref.perturbers.base import Perturber, PerturbOptions, load_perturber
from diffpref.perturbers.rules import KINDS, OTHERS, perturb

LEVELS = ("weak", "medium", "strong")


def changed(before: str, after: str) -> list[int]:
    """The places of the words that differ."""
    pairs = zip(before.split(), after.split(), strict=True)
    return [place for place, (one, other) in enumerate(pairs) if one != other]


def test_levels_exchange_one_half_and_all_of_the_known_words():
    caption = "a large red circle on the left, grey background"  # five known: large, red, circle, on the left, grey
    for draw in range(50):
        counts = {level: len(changed(caption, perturb(caption, level, draw))) for level in LEVELS}
        places = {level: set(changed(caption, perturb(caption, level, draw))) for level in LEVELS}
        assert counts["weak"] in (1, 2) and counts["strong"] in (5, 6)  # "on the left" is one
        assert places["weak"] < places["medium"] < places["strong"]
        named = [read_caption(perturb(caption, level, draw)) for level in LEVELS]
        right = [sum(each.get(name) == value for name, value in read_caption(caption).items()) for each in named]
        assert right == [4, 2, 0]


def test_every_embedded_caption_loses_what_the_level_says():
    for number, composition in enumerate(world.compositions()):
        caption = composition.caption(number % 3)
        for level, right in (("weak", 4), ("medium", 2), ("strong", 0)):
            found = read_caption(perturb(caption, level, number))
            assert sum(found.get(name) == value for name, value in read_caption(caption).items()) == right, caption


@pytest.mark.parametrize("word", OTHERS)
def test_a_word_becomes_another_of_its_kind(word):
    kind = next(kind for kind in KINDS if word in kind)
    text = f"it has {word} things"
    found = {perturb(text, "strong", draw) for draw in range(200)}
    assert found == {f"it has {other} things" for other in kind if other != word}


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("An orange cat", "A (red|yellow|green|blue|purple|pink|brown) cat|An? .*"),
        ("RED house", "(ORANGE|YELLOW|GREEN|BLUE|PURPLE|PINK|BROWN) house"),
        ("Two dogs", "(Three|Four|Five|Six|Seven|Eight|Nine|Ten) dogs"),
        ("3 dogs", "([2456789]|10) dogs"),
        ("a cat in front of it", "a cat behind it"),
        ("a square", "a (circle|triangle|cross|rectangle|star|hexagon)"),
        ("a house at night", "a house by day"),
        ("a young man", "an? .*"),
    ],
)
def test_the_words_around_stay(text, pattern):
    for draw in range(30):
        found = perturb(text, "strong", draw)
        assert re.fullmatch(pattern, found) and found != text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", found, re.IGNORECASE), found


@pytest.mark.parametrize(
    "text",
    ["a red-haired knight", "shot at f/2 with 3.5 m", "credit, bored", "o'two x", "the version 2.1", "x/red y z"],
)
def test_parts_of_other_words_are_not_words(text):
    for draw in range(20):
        found = perturb(text, "strong", draw)
        assert sorted(re.findall(r"[\w'./-]+", found)) == sorted(re.findall(r"[\w'./-]+", text)) and found != text


def test_where_no_word_is_known_words_change_places():
    caption = "the knight rides his horse over hills, through forests and rivers towards a castle".replace("over", "up")
    counts = [len(changed(caption.replace(",", ""), perturb(caption, level, 3).replace(",", ""))) for level in LEVELS]
    assert counts == [2, 4, 6]
    assert sorted(perturb(caption, "strong", 3).replace(",", "").split()) == sorted(caption.replace(",", "").split())
    assert perturb("sad robot", "weak", 1) == "robot sad"
    assert perturb("Hunde, Katzen", "strong", 1) == "Katzen, Hunde"
    assert perturb("cat cat", "weak", 1) == "cat"


@pytest.mark.parametrize("text", ["", "cat", "...", "猫が歩く", "4k", "  "])
@pytest.mark.parametrize("level", LEVELS)
def test_a_text_without_two_words_stays(text, level):
    assert perturb(text, level, 5) == text


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="abAB .,!'-éمر猫\n1", max_size=40)
    | st.lists(st.sampled_from(["a", "an", "red", "Two", "cat", "cat,", "on the left", "of", "x"]), max_size=8).map(
        " ".join
    ),
    st.sampled_from(LEVELS),
    st.integers(0, 2**63 - 1),
)
def test_never_the_same_text_where_there_are_two_words(text, level, draw):
    found = perturb(text, level, draw)
    assert perturb(text, level, draw) == found
    words = re.findall(r"(?<![\w.,/])[^\W\d_]\w*(?:['’-]\w+)*(?![\w/])", text)
    if len(words) > 1:
        assert found != text


def test_it_is_a_perturber():
    loaded = load_perturber(PerturbOptions(level="strong"))
    assert isinstance(loaded, Perturber)
    assert loaded(["a man", "cat"], [1, 2]) == ["a woman", "cat"]
