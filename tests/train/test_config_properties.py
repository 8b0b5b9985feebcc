"""Properties of the configuration: it survives its YAML, and nothing that a file holds ends in a traceback."""

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import ANYTHING, MANY, QUICK, TEXTS

from diffpref.errors import UserError
from diffpref.presets import PRESETS
from diffpref.train.check import check
from diffpref.train.config import Config, TrainConfig
from diffpref.train.config_file import from_yaml, to_yaml

GROUPS = [entry.name for entry in fields(Config) if is_dataclass(getattr(Config(), entry.name))]
KEYS = [f"{group}.{entry.name}" for group in GROUPS for entry in fields(getattr(Config(), group))] + ["output_dir"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.yaml"


@st.composite
def configs(draw) -> Config:
    """A preset with some values of the right kinds changed."""
    config = PRESETS[draw(st.sampled_from(sorted(PRESETS)))]
    finite = st.floats(1e-12, 1e12)
    train: dict[str, Any] = {
        "max_steps": draw(st.integers(1, 2**60)),
        "learning_rate": draw(finite),
        "weight_decay": draw(finite),
        "snr_gamma": draw(st.none() | finite),
        "ema": draw(st.booleans()),
    }
    path = draw(st.text(min_size=1))
    model = replace(config.model, lora=tuple(draw(st.lists(TEXTS, max_size=3))))
    return replace(config, output_dir=path, model=model, train=replace(config.train, **train))


def round_trip(file: Path, config: Config) -> None:
    file.write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(file, Config()) == config


def nested(key: str, value: Any) -> dict[str, Any]:
    group, dot, name = key.rpartition(".")
    return {group: {name: value}} if dot else {name: value}


def any_value(file: Path, key: str, value: Any) -> None:
    """A value in a key gives a configuration that holds it, or one line that names the key."""
    file.write_text(json.dumps(nested(key, value)), encoding="utf-8")  # which is YAML too, for what JSON can say
    try:
        found = check(from_yaml(file, Config()))
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert from_yaml_text(file, to_yaml(found)) == found


def from_yaml_text(file: Path, text: str) -> Config:
    file.write_text(text, encoding="utf-8")
    return from_yaml(file, Config())


def any_file(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        assert isinstance(from_yaml(file, Config()), Config)
    except UserError as error:
        assert str(file) in str(error)


@QUICK
@given(configs())
def test_yaml_round_trip(file, config):
    round_trip(file, config)


@QUICK
@given(st.sampled_from(KEYS), ANYTHING)
def test_any_value_in_any_key(file, key, value):
    any_value(file, key, value)


@QUICK
@given(TEXTS, st.sampled_from(["", *GROUPS]), ANYTHING)
def test_unknown_keys_are_refused_by_name(file, key, group, value):
    known = {entry.name for entry in fields(getattr(Config(), group) if group else Config())}
    if key in known:
        return
    content = {group: {key: value}} if group else {key: value}
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError):
        from_yaml(file, Config())


@QUICK
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | ANYTHING.map(lambda v: repr(v).encode()))
def test_any_file(file, content):
    any_file(file, content)


@QUICK
@given(st.dictionaries(st.sampled_from(["max_steps", "batch_size", "seed"]), st.integers(1, 1000)))
def test_what_a_file_leaves_out_stays(file, given_keys):
    """The file lies over the base: its own keys are its, all others the base's."""
    base = replace(Config(), train=TrainConfig(max_steps=7, batch_size=8, seed=9))
    file.write_text(yaml.safe_dump({"train": given_keys}), encoding="utf-8")
    assert from_yaml(file, base).train == replace(base.train, **given_keys)


@pytest.mark.slow
@MANY
@given(configs())
def test_yaml_round_trip_often(file, config):
    round_trip(file, config)


@pytest.mark.slow
@MANY
@given(st.sampled_from(KEYS), ANYTHING)
def test_any_value_in_any_key_often(file, key, value):
    any_value(file, key, value)


@pytest.mark.slow
@MANY
@given(st.binary(max_size=400))
def test_any_file_often(file, content):
    any_file(file, content)
