"""The documentation against the code: nothing stale, nothing missing, no link that points nowhere."""

import ast
import contextlib
import functools
import importlib.util
import io
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from diffpref.__main__ import COMMANDS, main
from diffpref.cli.data import COMMANDS as DATA_COMMANDS
from diffpref.data.findings import KINDS
from diffpref.data.images import REASONS
from diffpref.objectives import Objective
from diffpref.presets import PRESETS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
PAGES = [page for page in PAGES if page.is_file()]
EVERYTHING = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EMBEDDED_FIGURES = {  # what docs/embedded.md tells of the constants of embedded/build
    ("base", "PICTURES"): "{:,} pictures",
    ("base", "SPOILT_SHARE"): "{:.0%} of them are **spoilt**",
    ("base", "EMPTY_CAPTION_RATE"): "{:.0%} are empty",
    ("base", "WRONG_ATTRIBUTE_RATE"): "probability of {:.0%}",
    ("base", "TEXT_LENGTH"): "{} tokens",
    ("base", "VAE_STEPS"): "{} batches of 64 pictures",
    ("base", "VAE_BATCH"): "batches of {} pictures",
    ("base", "BASE_BATCH"): "batches of {}, AdamW",
    ("preferences", "HELDOUT_COMPOSITIONS"): "{} are **held out**",
    ("preferences", "FLIPPED_SHARE"): "about {:.0%} of the labels are flipped",
    ("__main__", "steps"): "{} batches of 128",
    ("__main__", "pairs"): "{:,} pairs",
    ("__main__", "seed"): "`--seed` is {} by default",
}


def make_configuration():
    spec = importlib.util.spec_from_file_location("make_configuration", DOCS / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", make_configuration().PAGES, ids=lambda page: page.name)
def test_the_generated_tables_are_those_of_the_code(page):
    written = page.read_text(encoding="utf-8")
    assert make_configuration().render(written) == written, "run `python docs/make_configuration.py`"


def test_every_key_and_value_is_on_the_configuration_page():
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    maker = make_configuration()
    for config in PRESETS.values():
        for key in maker._flat(config):
            assert f"| `{key}` |" in page, key


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_documented(name):
    assert f"`{name}`" in EVERYTHING


@pytest.mark.parametrize("command", [*COMMANDS, *(f"data {name}" for name in DATA_COMMANDS)])
def test_every_command_is_documented(command):
    assert re.search(rf"diffpref {command}\b", EVERYTHING)


@pytest.mark.parametrize("kind", KINDS)
def test_every_finding_has_its_row(kind):
    page = (DOCS / "data-format.md").read_text(encoding="utf-8")
    if kind.removeprefix("image_") in REASONS:
        assert f"`{kind.removeprefix('image_')}`" in page
    else:
        assert re.search(rf"^\| [^|]*`{kind}`[^|]* \| {KINDS[kind][0]} \|", page, re.MULTILINE)


@pytest.mark.parametrize("kind", get_args(Objective))
def test_every_objective_has_its_row(kind):
    page = (DOCS / "objectives.md").read_text(encoding="utf-8")
    assert f"\n| `{kind().name}` |" in page


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every call of diffpref in a shell block."""
    found = []
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            lines = block.replace("\\\n", " ").splitlines() if language in ("", "bash") else []
            for line in lines:
                if match := re.match(r"(?:\$ )?(?:\S*bin/|(?:accelerate|torchrun)\b.* -m )?(diffpref .*)", line):
                    found.append((page.name, match[1]))
    return found


@functools.cache
def help_text(command: tuple[str, ...]) -> str:
    """What `diffpref COMMAND --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue()


@pytest.mark.parametrize(("page", "line"), commands())
def test_documented_commands_have_these_options(page, line):
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index(">")] if ">" in words else words
    assert words and (words[0] in COMMANDS or words[0].startswith("-")), f"{page}: {line}"
    if words[0].startswith("-"):
        return
    trains = words[0] in ("train", "plan")  # they take a preset, whose help lists the keys
    size = 2 if words[0] == "data" or (trains and words[1] in PRESETS) else 1
    command = words[:size] if not trains or size == 2 else [words[0], next(iter(PRESETS))]
    known = help_text(tuple(command)) + (help_text((words[0],)) if trains else "")
    for word in words[size:]:
        if word.startswith("--"):
            assert re.search(rf"{word.partition('=')[0]}(?![\w-])", known), f"{page}: {line}: {word}"


def test_links_point_somewhere():
    broken = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        text = re.sub(r"`[^`\n]*`", "", text)
        targets = re.findall(r"\]\(([^)\s]+)\)", text)
        targets += re.findall(r"<(?:img|a|source)\b[^>]*?(?:src|srcset|href)=\"([^\"]+)\"", text)
        for target in targets:
            if not re.match(r"[a-z]+:", target) and not _exists(page, target):
                broken.append(f"{page.name}: {target}")
    assert not broken


def _exists(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if page.parent == DOCS and not file.is_relative_to(DOCS):  # the site holds nothing outside docs/
        return False
    return file.exists() and (not anchor or anchor in _anchors(file))


def _anchors(file: Path) -> set[str]:
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f": {page.name}\n" in navigation, page.name


@pytest.mark.parametrize(("module", "name"), EMBEDDED_FIGURES)
def test_the_embedded_page_tells_the_figures_of_the_build(module, name):
    source = ROOT / "src" / "diffpref" / "embedded" / "build" / f"{module}.py"
    value = _constants(source)[name]
    page = " ".join((DOCS / "embedded.md").read_text(encoding="utf-8").split())
    assert EMBEDDED_FIGURES[module, name].format(value) in page


def _constants(source: Path) -> dict[str, object]:
    """The literal values that a module or its classes give to names, read without running it."""
    values: dict[str, object] = {}
    for entry in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(entry, ast.Assign):
            targets, given = entry.targets[0], entry.value
        elif isinstance(entry, ast.AnnAssign) and entry.value is not None:
            targets, given = entry.target, entry.value
        else:
            continue
        if isinstance(targets, ast.Tuple) and isinstance(given, ast.Tuple):
            both = list(zip(targets.elts, given.elts, strict=False))
        else:
            both = [(targets, given)]
        for target, literal in both:
            if isinstance(target, ast.Name) and isinstance(literal, ast.Constant):
                values[target.id] = literal.value
    return values
