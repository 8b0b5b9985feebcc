"""The tree keeps its shape: who may import whom, how long a file may be, and what comes with an objective."""

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from diffpref.models.loading import FAMILIES
from diffpref.objectives import Objective
from diffpref.presets import PRESETS

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "diffpref"
FILES = sorted(SRC.rglob("*.py"))
LINES = 400

# What a module or package may import of ours, besides itself. What is not named here may import all but `cli`.
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "files": {"errors"},
    "hub": {"errors"},
    "redaction": set(),
    "draws": set(),
    "moving": set(),
    "sharding": set(),
    "progress": set(),
    "schedules": {"errors", "moving", "types"},
    "solvers": {"errors", "moving", "schedules", "types"},
    "traits": set(),
    "points": {"types", "draws", "moving", "traits"},
    "reference": {"types", "sharding"},
    "sampling": {"types", "errors", "schedules"},
    "objectives": {"types", "traits"},
    "models": {"types", "moving", "schedules", "errors", "files", "hub", "train.config", "embedded"},
    "scorers": {"errors", "files", "hub", "embedded"},
    "scorers.parts": {"errors", "files", "hub", "scorers.base"},
    "modules": {"errors"},
    "language": {"errors", "draws", "hub", "models.folder"},
    "captioners": {"errors", "embedded", "language", "models.folder", "modules"},
    "perturbers": {"errors", "draws", "language", "modules"},
    "train.config": {"errors", "objectives", "points"},
    "presets": {"errors", "objectives", "points", "train.config"},
    "plan": {
        "errors",
        "types",
        "models",
        "objectives",
        "points",
        "reference",
        "data.schema",
        "data.store",
        "train.config",
    },
    "data": {
        "types",
        "errors",
        "files",
        "hub",
        "draws",
        "progress",
        "scorers.base",
        "captioners.base",
        "perturbers.base",
        "train.config",
    },
    "evaluate": {"types", "errors", "files", "draws", "progress", "sampling", "scorers", "data", "embedded"}
    | {"captioners.base"},
    "embedded": set(),  # but for its build script, which stands above everything as a command does
}
FREE = ("embedded.build",)


def name_of(file: Path) -> str:
    """The dotted name of a file's module without `diffpref.`; "" for the package itself."""
    parts = file.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def imports(file: Path) -> set[str]:
    """The dotted names, without `diffpref.`, of our modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "diffpref":
                found.add(_module(name.removeprefix("diffpref").removeprefix(".")))
    return found - {""}


def _module(name: str) -> str:
    """The longest start of a dotted name that is a module: `types.Batch` is of `types`."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def rule_of(name: str) -> str | None:
    """The narrowest entry of ALLOWED that a module falls under; None if it may import what it likes."""
    if any(within(name, free) for free in FREE):
        return None
    return max((package for package in ALLOWED if within(name, package)), key=len, default=None)


def test_the_reader_of_imports_sees_them():
    assert imports(SRC / "objectives" / "dpo.py") == {"traits", "types"}
    assert {"errors", "models.folder", "schedules", "train.config"} <= imports(SRC / "models" / "sd.py")
    assert "train.loop" in imports(SRC / "cli" / "train.py")  # within a function


@pytest.mark.parametrize("package", ALLOWED)
def test_every_rule_is_about_something(package):
    assert any(within(name, package) for name in MODULES)
    assert all(any(within(name, allowed) for name in MODULES) for allowed in ALLOWED[package])


@pytest.mark.parametrize("name", [name for name in MODULES if rule_of(name)])
def test_import_direction(name):
    package = rule_of(name)
    allowed = ALLOWED[package] | {package}
    strangers = {other for other in imports(MODULES[name]) if not any(within(other, each) for each in allowed)}
    assert not strangers, f"{name} imports {sorted(strangers)}; {package} may import {sorted(ALLOWED[package])}"


TOOLS = [
    (package, name) for package in ("scorers", "captioners", "perturbers") for name in MODULES if within(name, package)
]


@pytest.mark.parametrize(("package", "name"), TOOLS)
def test_a_tool_imports_no_other_tool_of_its_kind(package, name):
    others = {other for other in imports(MODULES[name]) if within(other, package)}
    assert all(other in {package, f"{package}.base"} or within(other, f"{package}.parts") for other in others)


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, "models")])
def test_a_family_imports_no_other_family(name):
    families = {f"models.{family}" for family in FAMILIES.values()}
    assert not imports(MODULES[name]) & families


def test_only_main_imports_cli():
    importers = {name for name, file in MODULES.items() if any(within(other, "cli") for other in imports(file))}
    assert {name for name in importers if not within(name, "cli")} <= {"__main__"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SRC)))
def test_files_are_short_and_finished(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES, f"{file} has over {LINES} lines"
    assert not re.search(r"\bTODO\b|\bFIXME\b|NotImplementedError\(", text)
    assert not re.search(r"raise NotImplementedError", text)


@pytest.mark.parametrize("file", [file for file in FILES if file.stat().st_size], ids=lambda f: str(f.relative_to(SRC)))
def test_every_file_says_what_it_is(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("kind", get_args(Objective), ids=lambda kind: kind().name)
def test_an_objective_has_its_file_its_test_and_its_row(kind):
    name = kind().name
    assert kind.__module__ == f"diffpref.objectives.{name}"
    assert (ROOT / "tests" / "objectives" / f"test_{name}.py").is_file()
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert re.search(rf"^\|.*`{re.escape(name)}`.*\|", page, re.MULTILINE), f"docs/objectives.md has no row for {name}"


def test_every_objective_file_is_in_the_union():
    files = {file.stem for file in (SRC / "objectives").glob("*.py")} - {"__init__"}
    assert files == {kind().name for kind in get_args(Objective)}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_names(name):
    methods = [*(kind().name.replace("_", "-") for kind in get_args(Objective)), "dcpo", "inpo", "npo", "spin"]
    assert re.fullmatch(rf"[a-z0-9]+(-turbo|-refiner)?-({'|'.join(methods)})(-lora)?", name)


def test_a_family_is_a_module():
    assert all((SRC / "models" / f"{family}.py").is_file() for family in FAMILIES.values())
