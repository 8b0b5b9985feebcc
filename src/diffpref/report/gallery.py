"""The gallery: images of one prompt and seed side by side, chosen in honest ways, and sorted as the reader likes."""

import html
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from diffpref.evaluate.compare import Comparison
from diffpref.evaluate.folders import GeneratedImage, open_image, read_folder
from diffpref.progress import track
from diffpref.report.parts import section
from diffpref.report.pictures import LARGEST_SHOWN, Keep, card, inside, picture

SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Choice:
    """Some of a comparison's places, how they were chosen, and of how many."""

    title: str
    how: str
    places: list[int]


@dataclass(frozen=True)
class Look:
    """How much a gallery shows: places of each kind, the rest too or not, pictures how large and kept where."""

    each: int = 8
    rest: bool = False
    picture_size: int = LARGEST_SHOWN
    keep: Keep = inside


def script() -> str:
    """What sorts a gallery."""
    return resources.files("diffpref.report").joinpath("gallery.js").read_text(encoding="utf-8")


def sides(comparison: Comparison) -> list[str]:
    """What the folders are called on the page."""
    return ["base", "tuned"] if len(comparison.folders) == 2 else list(comparison.names)


def gallery(comparison: Comparison, look: Look) -> str:
    """The section with the chosen places and the controls that sort them."""
    chosen = choices(comparison, look.each)
    if look.rest:
        shown = {place for choice in chosen for place in choice.places}
        rest = [place for place in range(len(comparison.places)) if place not in shown]
        chosen.append(Choice("All others", "In the order of the base folder.", rest))
    wanted = list(dict.fromkeys(place for choice in chosen for place in choice.places))
    cards = {place: _card(comparison, place, look) for place in track(wanted, "page", len(wanted), "pairs")}
    parts = []
    for choice in chosen:
        title, how = html.escape(choice.title), html.escape(choice.how)
        of_choice = "".join(cards[place] for place in choice.places)
        parts.append(
            f'<h3>{title}</h3><p class="hint">{how}</p><div class="{_grid(comparison, look)}">{of_choice}</div>'
        )
    sorted_ones = f'<div class="{_grid(comparison, look)}" id="sorted" hidden></div>'
    groups = f'<div id="chosen">{"".join(parts)}</div>'
    return section("Same prompt, same seed", f"{_controls(comparison)}{groups}{sorted_ones}")


def choices(comparison: Comparison, each: int) -> list[Choice]:
    """Places chosen in honest ways: at random, and for each tuned folder its largest wins and losses by one scorer."""
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(comparison.places)).tolist()
    drawn = order[:each]
    chosen = [Choice("Random", f"{len(drawn)} of {len(order)} pairs, drawn without looking at scores.", drawn)]
    several = len(comparison.scorers) > 1
    by = f" by {comparison.scorers[0]}" if several else ""
    for folder in range(1, len(comparison.folders)):
        differences = comparison.differences(folder)
        rising = np.argsort(differences, kind="stable").tolist()
        won = [place for place in reversed(rising) if differences[place] > 0]
        lost = [place for place in rising if differences[place] < 0]
        name = "the tuned model" if len(comparison.folders) == 2 else comparison.names[folder]
        of = "" if len(comparison.folders) == 2 else f" of {name}"
        chosen += [
            Choice(f"Largest wins{of}", _how(won, each, f"won by {name}", f"gains in score{by}"), won[:each]),
            Choice(f"Largest losses{of}", _how(lost, each, f"lost by {name}", f"drops in score{by}"), lost[:each]),
        ]
    return chosen


def sample_cards(folder: Path, size: int) -> list[str]:
    """The first `size` images of a generated folder, each with its prompt."""
    cards = []
    for image in read_folder(folder)[:size]:
        seed = "" if image.seed is None else f'<p class="note"><span>seed {image.seed}</span></p>'
        caption = f'<figcaption><p class="prompt" dir="auto">{html.escape(image.prompt)}</p>{seed}</figcaption>'
        cards.append(f'<figure class="card">{picture(open_image(image), f"sample: {image.prompt}")}{caption}</figure>')
    return cards


def _how(places: list[int], each: int, what: str, change: str) -> str:
    if not places:
        return f"No pair was {what}."
    return f"The {min(each, len(places))} largest {change} among the {len(places)} pairs {what}."


def _card(comparison: Comparison, number: int, look: Look) -> str:
    """The images of one place with all their scores; its attributes are what the page's script sorts by."""
    place, scores = comparison.places[number], comparison.values[:, :, number]
    names = sides(comparison)
    one = len(comparison.scorers) == 1
    shown = []
    for name, file, score in zip(names, place.files, scores[0], strict=True):
        image = open_image(GeneratedImage(file, place.prompt, place.index, place.seed))
        drawn = picture(image, f"{name}: {place.prompt}", look.picture_size, look.keep)
        shown.append((name, f"{score:.3f}" if one else "", drawn))
    said = [f"seed {place.seed}"] * (place.seed is not None) + [html.escape(place.category or "")]
    note = "".join(f"<span>{text}</span>" for text in said if text)
    if one and len(names) == 2:
        note += _change(scores[0, 1] - scores[0, 0])
    else:
        note += _scores(comparison.scorers, names, scores)
    drifts = ",".join(f"{spread.drifts[number]:.6g}" for spread in comparison.spreads)
    table = ";".join(",".join(repr(float(value)) for value in row) for row in scores)
    attributes = f' data-place="{number}" data-scores="{table}" data-drifts="{drifts}"'
    attributes += f' data-category="{html.escape(place.category or "")}"'
    return card(shown, place.prompt, note, attributes)


def _scores(scorers: tuple[str, ...], names: list[str], scores: np.ndarray) -> str:
    """A row for each scorer: the base's score, and the others' with their difference."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = []
    for scorer, (base, *others) in zip(scorers, scores.tolist(), strict=True):
        cells = "".join(f"<td>{score:.3f} {_change(score - base)}</td>" for score in others)
        rows.append(f"<tr><th>{html.escape(scorer)}</th><td>{base:.3f}</td>{cells}</tr>")
    return f'<table class="scores"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _change(difference: float) -> str:
    kind = "win" if difference > 0 else "loss" if difference < 0 else "tie"
    text = f"{difference:+.3f}".replace("-", "−") if difference else "tie"
    return f'<b class="{kind}">{text}</b>'


def _grid(comparison: Comparison, look: Look) -> str:
    wide = len(comparison.folders) > 2 or len(comparison.scorers) > 1
    return "cards" + " wide" * wide + " many" * look.rest


def _controls(comparison: Comparison) -> str:
    """What the reader sorts and filters by; hidden until the script is there to listen."""
    names = sides(comparison)
    kinds = list(dict.fromkeys(place.category for place in comparison.places if place.category is not None))
    keys = {"chosen": "as chosen", "difference": "difference"}
    keys |= {f"score-{place}": f"score of {name}" for place, name in enumerate(names)}
    keys |= {"drift": "drift from the base"} if comparison.spreads else {}
    fields = [
        _select("sort", "Sort by", {**keys, "prompt": "prompt"}),
        _select("order", "Order", {"down": "highest first", "up": "lowest first"}),
        _select("scorer", "Scorer", {str(place): name for place, name in enumerate(comparison.scorers)}),
        _select("folder", "Model", {str(place): name for place, name in enumerate(names) if place}),
        _select("category", "Category", {"": "all", **{kind: kind for kind in kinds}}) if kinds else "",
        '<label>Prompt<input id="words" type="search" placeholder="any words" autocomplete="off"></label>',
    ]
    said = '<p class="hint" id="said" role="status"></p>'
    return f'<div class="controls" id="controls" hidden>{"".join(fields)}</div>{said}'


def _select(name: str, label: str, options: dict[str, str]) -> str:
    """A field to choose from; hidden where there is no choice."""
    listed = "".join(
        f'<option value="{html.escape(key)}">{html.escape(text)}</option>' for key, text in options.items()
    )
    hidden = " hidden" if len(options) == 1 else ""
    return f'<label{hidden}>{label}<select id="{name}">{listed}</select></label>'
