"""The configuration as YAML, read strictly: unknown keys are refused with the nearest right name."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from diffpref.errors import UserError, nearest
from diffpref.train.config import Config

T = TypeVar("T")


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `from_yaml` reads back to the same value."""
    import yaml

    plain = _plain(asdict(config))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    if any(
        mark in text for mark in "\x85\u2028\u2029"
    ):  # line breaks that PyYAML writes as they are and reads as spaces
        text = yaml.safe_dump(plain, sort_keys=False)
    return text


def from_yaml(path: Path, base: T) -> T:
    """`base`, a dataclass, with the keys that a YAML file gives; those it leaves out stay.

    Raises UserError with one line that names the file and the key: unknown keys with the nearest right name, values
    of a wrong type with the type wanted.
    """
    import yaml
    from pydantic import ValidationError

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected keys with values at the top, found a {type(given).__name__}")
    merged = _merged(base, given, str(path), "")
    try:
        return _adapter(type(base)).validate_json(json.dumps(_floats(merged, type(base)), default=str), strict=True)
    except ValidationError as error:
        faults = error.errors()
        # a group that may be of several kinds is tried as each: the wrong kinds complain of the name, which is right
        first = next((fault for fault in faults if fault["loc"][-1] != "name"), faults[0])
        key = ".".join(_keys(first["loc"], merged))
        raise UserError(f"{path}: {key}: {first['msg'].lower()}, got {first['input']!r}") from error


@lru_cache(8)
def _adapter(kind: type) -> Any:
    """What reads a dataclass; making one takes longer than using it."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _keys(place: tuple[int | str, ...], given: Any) -> list[str]:
    """The keys and indices of a place in a validation error, without the names of the types that were tried."""
    found = []
    for part in place:
        with contextlib.suppress(KeyError, IndexError, TypeError):  # the name of a type is no key
            given = given[part]
            found.append(str(part))
    return found


def _merged(base: Any, given: dict[Any, Any], file: str, prefix: str) -> dict[str, Any]:
    """asdict(base) with the given keys laid over it, unknown ones refused; a group's `name` may choose its kind."""
    if "name" in given and (kinds := _kinds(prefix.rstrip("."))) and given["name"] != base.name:
        if str(given["name"]) not in kinds:
            raise UserError(f"{file}: {prefix}name: unknown {given['name']!r}: {nearest(str(given['name']), kinds)}")
        base = kinds[given["name"]]()
    known = {entry.name: getattr(base, entry.name) for entry in fields(base)}
    result: dict[str, Any] = asdict(base)
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{file}: unknown key {prefix}{key}: {nearest(str(key), known)}")
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise UserError(f"{file}: {prefix}{key}: expected a group of keys, got {value!r}")
            value = _merged(known[key], value, file, f"{prefix}{key}.")
        result[key] = value
    return result


def with_kind(config: Config, group: str, name: str) -> Config:
    """The configuration with a group (`objective`, `points`) of the kind of that name, with the kind's own defaults.

    A group that is of the kind already keeps its values. Raises UserError with the nearest name.
    """
    kinds = _kinds(group)
    if name not in kinds:
        raise UserError(f"--{group}.name: unknown {name!r}: {nearest(name, kinds)}")
    return config if getattr(config, group).name == name else replace(config, **{group: kinds[name]()})


def _kinds(group: str) -> dict[str, type]:
    """The kinds that a group of the configuration may be of, by their `name`."""
    kinds = get_args(get_type_hints(Config).get(group))
    return {kind().name: kind for kind in kinds}


def _floats(value: Any, annotation: Any) -> Any:
    """Numbers that YAML 1.1 reads as text ("1e-4") as the numbers they are, where a float is wanted."""
    if isinstance(value, dict):
        kinds: list[Any] = [kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)]
        if not kinds:  # a group where a value is wanted, which is refused by its type
            return value
        chosen = next((k for k in kinds if k().name == value.get("name")), kinds[0]) if len(kinds) > 1 else kinds[0]
        hints = get_type_hints(chosen)
        return {key: _floats(entry, hints.get(key)) for key, entry in value.items()}
    if float in (annotation, *get_args(annotation)) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value
