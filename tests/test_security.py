"""No code runs from data, no secret is written or said, and the libraries are as new as they must be."""

import ast
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support.datasets import pickapic_row, write_pickapic
from support.runs import tiny_config

from diffpref import redaction
from diffpref.train.config_file import to_yaml
from diffpref.train.loop import train

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "src").rglob("*.py"))
CANARY = "canary0123456789"
SECRETS = {name: f"{CANARY}-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "DATABASE_PASSWORD")}

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "xmlrpc", "telnetlib"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "pickle.load", "runpy.run_path"}
BY_LIBRARIES = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.save"}
ENDS = (".read_pickle", ".to_pickle", ".extractall", ".unpack_archive")
ASKED_FOR = {("scorers/base.py", "exec")}  # a scorer in a Python file, which the user names on the command line


def dotted(node: ast.expr) -> str:
    """`torch.load` of such an expression; "" of others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else f"?.{node.attr}"
    return ""


def dangers(code: str) -> list[str]:
    """What of a module could run code that somebody else wrote."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            given = {keyword.arg: keyword.value for keyword in node.keywords}

            def says(key: str, value: object, given: dict = given) -> bool:
                return key in given and isinstance(given[key], ast.Constant) and given[key].value is value

            if name in CALLS:
                found.append(name)
            elif name in ("torch.load", "torch.serialization.load") and not says("weights_only", True):
                found.append("torch.load without weights_only=True")
            elif name in BY_LIBRARIES or name.endswith(ENDS):
                found.append(name)
            if "allow_pickle" in given and not says("allow_pickle", False):
                found.append("allow_pickle")
            if "trust_remote_code" in given and not says("trust_remote_code", False):
                found.append("trust_remote_code")
            if re.search(r"(^|\.)Auto(?!encoder)\w+\.from_pretrained$", name) and not says("trust_remote_code", False):
                found.append(f"{name} without trust_remote_code=False")
            if "shell" in given and not says("shell", False):
                found.append("shell")
    return found


def test_the_package_runs_no_code_from_data():
    source = ROOT / "src" / "diffpref"
    found = {(file.relative_to(source).as_posix(), what) for file in FILES for what in dangers(file.read_text())}
    assert found == ASKED_FOR


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import load",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "torch.save(x, 'y')",
        "np.load(x, allow_pickle=True)",
        "yaml.load(x)",
        "eval(x)",
        "exec(x)",
        "AutoModel.from_pretrained(x)",
        "transformers.AutoModel.from_pretrained(x, trust_remote_code=given)",
        "kind.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "archive.extractall(x)",
    ],
)
def test_the_audit_sees_what_it_looks_for(code):
    assert dangers(code)


def test_what_a_run_writes_is_text_pictures_and_tensors(pipeline, tiny_pairs, tmp_path):
    run = train(tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=2, ema=True))
    kinds = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".yaml", ".html", ".safetensors", ".txt", ".model", ".parquet", ".png"}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["train", "--hub-token", CANARY, "--seed", "3"], ["train", "--hub-token", "***", "--seed", "3"]),
        ([f"--api_key={CANARY}", "x"], ["--api_key=***", "x"]),
        (["--token", f"{CANARY}"], ["--token", "***"]),
        (["--data.path", f"https://me:{CANARY}@host/x"], ["--data.path", "https://***@host/x"]),
        ([f"--url=https://{CANARY}@host/x?q=a@b"], ["--url=https://***@host/x?q=a@b"]),
        (
            ["--key-variable", "A_KEY", "--max-new-tokens", "77"],
            ["--key-variable", "A_KEY", "--max-new-tokens", "77"],
        ),
        (["hf_" + "a" * 20, "sk-" + "b" * 20], ["***", "***"]),
        (["--prompts", "a key, a token: me@home"], ["--prompts", "a key, a token: me@home"]),
    ],
)
def test_the_command_line_is_noted_without_secrets(given, shown):
    assert redaction.command(given) == shown


def test_secrets_of_the_environment_are_known_by_their_names(monkeypatch):
    for name, value in {**SECRETS, "SIGNING_KEY_2": "9876543210", "MINE": CANARY, "SHORT_KEY": "abc"}.items():
        monkeypatch.setenv(name, value)
    for name in ("TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "KEYBOARD"):
        monkeypatch.setenv(name, "harmless")
    said = "harmless abc " + " ".join([*SECRETS.values(), "9876543210"])
    assert redaction.redacted(said) == "harmless abc *** *** *** *** ***"
    assert CANARY in redaction.redacted(CANARY)
    monkeypatch.setattr(sys, "argv", ["diffpref", "--key-variable", "MINE"])
    assert redaction.redacted(CANARY) == "***"
    monkeypatch.setattr(sys, "argv", ["diffpref", "--hub-token", "from the line"])
    assert redaction.redacted("it is from the line") == "it is ***"


def test_logs_are_without_secrets(monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    record = logging.makeLogRecord({"msg": "asked with %s of %d", "args": (SECRETS["HF_TOKEN"], 3)})
    assert redaction.log_filter(record) and record.getMessage() == "asked with *** of 3"


def test_the_run_folder_notes_no_secret(pipeline, tiny_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["diffpref", "train", "--wandb-key", CANARY, f"https://u:{CANARY}@host"])
    run = train(tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=1))
    noted = json.loads((run / "environment.json").read_text())
    assert noted["command"] == ["diffpref", "train", "--wandb-key", "***", "https://***@host"]


def test_no_secret_is_in_any_file_or_stream(pipeline, tiny_pairs, tmp_path):
    """Commands that work and commands that fail, in processes of their own, with secrets all around them."""
    source = tmp_path / "source"
    write_pickapic(source / "train-00000-of-00001.parquet", [pickapic_row(number) for number in range(4)])
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_config(pipeline, tiny_pairs, tmp_path / "run", max_steps=1)))
    address = f"https://me:{CANARY}@host/x"
    draw = [str(pipeline), str(tmp_path / "images"), "--prompts", str(tmp_path / "prompts.txt"), "--resolution", "32"]
    commands = [
        (0, ["train", "--config", str(tmp_path / "config.yaml")]),
        (2, ["train", "embedded-dpo", "--hub-token", f"{CANARY}-given"]),
        (2, ["train", "embedded-dpo", "--model.pretrained", address]),
        (0, ["data", "import", "pickapic", str(source), str(tmp_path / "imported")]),
        (2, ["data", "import", "pickapic", address, str(tmp_path / "other")]),
        (2, ["data", "import", "pickapic", f"{CANARY}/secret-{CANARY}", str(tmp_path / "o"), f"--api-key={CANARY}"]),
        (0, ["generate", *draw, "--steps", "2"]),
        (1, ["crash"]),
    ]
    program = f"""
import sys
from diffpref import __main__ as program
codes = []
for arguments in {[arguments for _, arguments in commands[:-1]]!r}:
    sys.argv = ["diffpref", *arguments]
    codes.append(program.main())
print("codes", codes)
raise RuntimeError("{CANARY}-HF_TOKEN in a traceback")
"""
    environment = os.environ | SECRETS | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert f"codes {[code for code, _ in commands[:-1]]}" in ended.stdout, ended.stderr
    assert "in a traceback" in ended.stderr and ended.stderr.count("***") >= 5
    assert CANARY not in ended.stdout
    told = [line for line in ended.stderr.splitlines() if CANARY in line and "raise RuntimeError" not in line]
    assert told == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_the_libraries_are_as_new_as_the_design_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    wanted += [Requirement(text) for extra in project["optional-dependencies"].values() for text in extra]
    floors = {each.name: Version(next(iter(each.specifier)).version) for each in wanted}
    assert all([part.operator for part in each.specifier] == [">="] for each in wanted)
    assert floors["diffusers"] >= Version("0.38") and floors["transformers"] >= Version("5.3")
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[name.lower().replace("_", "-")] = Version(version)
    for each in wanted:
        assert each.specifier.contains(pinned[each.name.lower().replace("_", "-")]), each


def test_none_of_the_libraries_that_the_design_leaves_out_is_imported():
    left_out = {"torchvision", "xformers", "deepspeed"}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & left_out, file
