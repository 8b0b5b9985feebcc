"""A perturber without weights: it exchanges words of colour, count, shape, place, size and a few more by others of
their kind.

The level says how many of the words that it knows are exchanged: `weak` one, `medium` half of them, `strong` all; a
stronger level exchanges what a weaker one does, and more. Where it knows no word, two words change places (`weak` one
pair, `medium` two, `strong` three), or, if there are no two, one is left out. A text of a single word stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from diffpref.draws import draw_seed, uniform
from diffpref.perturbers.base import Level, Perturber, PerturbOptions

TAKES = ("level", "seed")
VERSION = "1"  # of this module: raise it whenever its texts change
KINDS: tuple[tuple[str, ...], ...] = (  # a word is exchanged by another one of its line
    ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"),
    ("black", "white", "grey"),
    ("crimson", "turquoise", "golden", "silver", "violet"),
    ("gray", "black", "white"),
    ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    ("2", "3", "4", "5", "6", "7", "8", "9", "10"),
    ("a single", "a pair of", "a dozen"),
    ("many", "few"),
    ("circle", "square", "triangle", "cross", "rectangle", "star", "hexagon"),
    ("circles", "squares", "triangles", "crosses", "rectangles", "stars", "hexagons"),
    ("sphere", "cube", "pyramid", "cone", "cylinder"),
    ("spheres", "cubes", "pyramids", "cones", "cylinders"),
    ("round", "square", "triangular"),
    ("on the left", "in the centre", "on the right"),
    ("in the center", "on the left", "on the right"),
    ("in the middle", "on the left", "on the right"),
    ("to the left", "to the right"),
    ("left side", "right side"),
    ("left hand", "right hand"),
    ("at the top", "at the bottom"),
    ("above", "below"),
    ("over", "under"),
    ("in front of", "behind"),
    ("on top of", "underneath"),
    ("inside", "outside"),
    ("indoors", "outdoors"),
    ("near", "far from"),
    ("next to", "far from"),
    ("beside", "far from"),
    ("in the foreground", "in the background"),
    ("small", "large"),
    ("little", "big"),
    ("tiny", "huge"),
    ("giant", "tiny"),
    ("tall", "short"),
    ("long", "short"),
    ("wide", "narrow"),
    ("thick", "thin"),
    ("young", "old"),
    ("man", "woman"),
    ("men", "women"),
    ("boy", "girl"),
    ("boys", "girls"),
    ("at night", "by day"),
    ("day", "night"),
    ("sunrise", "sunset"),
    ("summer", "winter"),
    ("sunny", "rainy"),
    ("bright", "dark"),
    ("smiling", "frowning"),
    ("standing", "sitting"),
    ("open", "closed"),
)
OTHERS: dict[str, tuple[str, ...]] = {}
for _kind in KINDS:
    for _word in _kind:  # the first line that names a word is its kind
        OTHERS.setdefault(_word, tuple(other for other in _kind if other != _word))
SMALL = re.compile(
    "a|an|the|of|in|on|at|to|with|and|or|for|by|from|is|are|its|his|her|their|it|this|that|as", re.IGNORECASE
)
LONGEST_FIRST = sorted(OTHERS, key=len, reverse=True)
KNOWN = re.compile(rf"(?<![\w.,'’/-])(?:{'|'.join(map(re.escape, LONGEST_FIRST))})(?![\w'’/-]|[.,]\d)", re.IGNORECASE)
WORD = re.compile(r"(?<![\w.,/])[^\W\d_]\w*(?:['’-]\w+)*(?![\w/])")
ARTICLE = re.compile(r"\b(an?)(\s+)$", re.IGNORECASE)
PAIRS: dict[Level, int] = {"weak": 1, "medium": 2, "strong": 3}


@dataclass(frozen=True)
class Rules:
    """Exchanges words."""

    level: Level

    def __call__(self, texts: Sequence[str], draws: Sequence[int]) -> list[str]:
        """Each text with words exchanged."""
        return [perturb(text, self.level, draw) for text, draw in zip(texts, draws, strict=True)]


def perturb(text: str, level: Level, draw: int) -> str:
    """The text with words exchanged, as a function of the three; the same text where it has a single word or none."""
    known = list(KNOWN.finditer(text))
    if not known:
        return _reordered(text, level, draw)
    count = {"weak": 1, "medium": ceil(len(known) / 2), "strong": len(known)}[level]
    chosen = sorted(_shuffled(len(known), draw)[:count])
    for place in reversed(chosen):  # from the end, so that earlier places stay
        others = OTHERS[known[place][0].lower()]
        other = others[int(uniform(draw, f"word {place}") * len(others))]
        text = _put(text, known[place].span(), other)
    return text


def _put(text: str, span: tuple[int, int], word: str) -> str:
    """The text with another word in that place, in the case of the one that was there, after the right `a` or `an`."""
    start, end = span
    before, former = text[:start], text[start:end]
    if former.isupper() and len(former) > 1:
        word = word.upper()
    elif former[0].isupper():
        word = word[0].upper() + word[1:]
    if article := ARTICLE.search(before):
        right = "an" if word[0].lower() in "aeiou" else "a"
        right = right.upper() if article[1].isupper() and len(article[1]) > 1 else right
        right = right[0].upper() + right[1:] if article[1][0].isupper() else right
        before = before[: article.start(1)] + right + article[2]
    return before + word + text[end:]


def _reordered(text: str, level: Level, draw: int) -> str:
    """The text with pairs of different words exchanged, rather none of the small ones; or with a word left out."""
    words = list(WORD.finditer(text))
    telling = [word for word in words if not SMALL.fullmatch(word[0])]
    if len({word[0].lower() for word in telling}) < 2:
        telling = words
    order = [telling[place] for place in _shuffled(len(telling), draw)]
    pairs = []
    while order and len(pairs) < PAIRS[level]:
        first = order.pop(0)
        second = next((place for place, word in enumerate(order) if word[0].lower() != first[0].lower()), None)
        if second is not None:
            pairs.append((first, order.pop(second)))
    swapped = {one.span(): other[0] for a, b in pairs for one, other in ((a, b), (b, a))}
    for (start, end), word in sorted(swapped.items(), reverse=True):
        text = text[:start] + word + text[end:]
    if not pairs and len(words) > 1:
        start, end = words[int(uniform(draw, "left out") * len(words))].span()
        text = " ".join((text[:start] + text[end:]).split())
    return text


def _shuffled(count: int, draw: int) -> list[int]:
    return sorted(range(count), key=lambda place: (draw_seed(draw, "order", place), place))


def version(options: PerturbOptions) -> str:
    """Of this module."""
    return VERSION


def load(options: PerturbOptions) -> Perturber:
    """The rules; they are plain Python and run on the CPU."""
    return Rules(options.level)
