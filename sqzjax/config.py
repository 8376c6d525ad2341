# SPDX-License-Identifier: Apache-2.0
"""Read a YAML configuration into a frozen dataclass, reporting every problem at once.

A schema is a stdlib dataclass next to the code it configures; a union of dataclasses is told apart
by a field `kind: Literal[...]`. Sections left out take the default of their field, and a section
given in part keeps the rest of that default. `base: FILE` (or a list, at any level, relative to
the file that says it) is merged underneath; `key.sub=value` overrides are merged on top.

Strict: `"3"` and `1.5` and `true` are no integers, and an unknown key is an error. Loading costs
about 0.2 s, nearly all of it the import of pydantic, which converts the values.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from sqzjax.config_values import (
    KIND,
    Converter,
    default_of,
    hints_of,
    item_type,
    key_types,
    nested_sections,
    rule_of,
    sections_of,
    show,
)
from sqzjax.errors import ConfigError

BASE = "base"


def load[T](
    schema: type[T] | UnionType,
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> T:
    """Return `schema` filled from a YAML file or a mapping, then from `key.sub=value` overrides.

    Of a union of sections, the data's `kind` selects one.
    Raises `ConfigError` whose `problems` name each offending path, its value and the rule.
    """
    return parse(schema, read(schema, source), overrides)


def read(schema: Any, source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the raw mapping of a source with its `base` files merged in; nothing is checked."""
    if isinstance(source, Mapping):
        return _include(schema, dict(source), Path.cwd(), ())
    return _read_file(schema, Path(source), ())


def parse[T](
    schema: type[T] | UnionType, data: Mapping[str, Any], overrides: Sequence[str] = ()
) -> T:
    """Return `schema` filled from a raw mapping and overrides."""
    problems: list[str] = []
    merged: Any = dict(data)
    for text in overrides:
        try:
            merged = _override(schema, merged, text)
        except ConfigError as error:
            problems += error.problems
    config = Converter(problems).convert(schema, merged, "")
    if problems:
        raise ConfigError(problems)
    return config


def to_dict(config: Any) -> Any:
    """Return a config as plain dicts, lists and scalars that `load` reads back equal."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def dump(config: Any) -> str:
    """Return YAML text that `load` reads back equal."""
    from sqzjax import config_yaml

    return config_yaml.write(to_dict(config))


def fingerprint(config: Any) -> str:
    """Return the SHA-256 of a config's canonical JSON; equal configs have equal fingerprints."""
    text = json.dumps(_canonical(to_dict(config)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def describe(schema: Any, indent: str = "") -> str:
    """Return a table of a schema's keys, what each must be, and its default."""
    lines = []
    for section in sections_of(schema):
        doc = (section.__doc__ or "").strip().splitlines()[0]
        lines.append(f"{indent}# {section.__name__}: {doc}")
        for field in dataclasses.fields(section):
            hint = hints_of(section)[field.name]
            nested = nested_sections(hint)
            rule = " or ".join(inner.__name__ for inner in nested) or rule_of(hint)
            lines.append(f"{indent}{field.name}: {rule} ({_default_note(default_of(field))})")
            lines += [describe(inner, indent + "    ") for inner in nested]
    return "\n".join(lines)


def _default_note(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(default):
        return f"default {type(default).__name__}"
    return f"default {json.dumps(to_dict(default))}"


# Files and merging ------------------------------------------------------------------------------


def _read_file(schema: Any, path: Path, stack: tuple[Path, ...]) -> dict[str, Any]:
    from sqzjax import config_yaml

    resolved = path.resolve()
    if resolved in stack:
        chain = " -> ".join(str(item.name) for item in (*stack, resolved))
        raise ConfigError(f"{path}: base files include each other: {chain}; remove one of them")
    data = config_yaml.read_file(path, included_by=stack[-1] if stack else None)
    return _include(schema, data, path.parent, (*stack, resolved))


def _include(schema: Any, data: Any, folder: Path, stack: tuple[Path, ...]) -> Any:
    """Merge each mapping's `base` files underneath it, at every depth."""
    if isinstance(data, list | tuple):
        return [_include(item_type(schema), item, folder, stack) for item in data]
    if not isinstance(data, Mapping):
        return data
    known = key_types(schema, data)
    own = {
        key: _include(known.get(key, Any), value, folder, stack)
        for key, value in data.items()
        if key != BASE or BASE in known
    }
    if BASE not in data or BASE in known:
        return own
    names = data[BASE] if isinstance(data[BASE], list) else [data[BASE]]
    merged: Any = {}
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"base: got {show(name)}; must be a file name or a list of them")
        merged = _merge(schema, merged, _read_file(schema, folder / name, stack))
    return _merge(schema, merged, own)


def _merge(schema: Any, low: Any, high: Any) -> Any:
    """Put `high` over `low`, key by key; lists and changed unions are replaced as a whole."""
    if not isinstance(low, Mapping) or not isinstance(high, Mapping):
        return high
    changed = KIND in low and KIND in high and low[KIND] != high[KIND]
    if changed and len(sections_of(schema)) > 1:
        return dict(high)  # the settings of one kind mean nothing to another
    known = key_types(schema, {**low, **high})
    merged = {k: _merge(known.get(k, Any), low[k], v) if k in low else v for k, v in high.items()}
    return {**low, **merged}


def _override(schema: Any, data: Any, text: str) -> Any:
    from sqzjax import config_yaml

    path, equals, value_text = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {text!r} must be of the form key.sub=value")
    value = config_yaml.read_text(value_text, f"override {text!r}")
    return _put(schema, data, keys, value, text)


def _put(schema: Any, data: Any, keys: list[str], value: Any, text: str) -> Any:
    """Return `data` with `value` at `keys`."""
    if not keys:
        if isinstance(data, Mapping) and not isinstance(value, Mapping) and value is not None:
            raise ConfigError(
                f"override {text!r} would replace a section by {show(value)}; set one of its "
                f"keys: {', '.join(map(str, data))}"
            )
        return _merge(schema, data, value)
    key, rest = keys[0], keys[1:]
    if isinstance(data, list | tuple):
        if not (key.isdecimal() and int(key) < len(data)):
            raise ConfigError(
                f"override {text!r}: {key!r} must be the index of one of {len(data)} items"
            )
        items = list(data)
        items[int(key)] = _put(item_type(schema), items[int(key)], rest, value, text)
        return items
    if data is not None and not isinstance(data, Mapping):
        raise ConfigError(f"override {text!r}: there is no {key!r} inside the value {show(data)}")
    section = data or {}
    inner_type = key_types(schema, section).get(key, Any)
    patch = {key: _put(inner_type, section.get(key), rest, value, text)}
    return _merge(schema, section, patch) if key == KIND else {**section, **patch}


def _canonical(value: Any) -> Any:
    """One spelling for equal numbers: `1.0` in a float field may have been given as `1`."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
