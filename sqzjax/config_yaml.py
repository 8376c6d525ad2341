# SPDX-License-Identifier: Apache-2.0
"""YAML as configurations need it: scalars as in YAML 1.2, duplicate keys refused, no aliases.

PyYAML reads YAML 1.1, where `1e-4` is text and `no` is False. Here `1e-4` is a number and only
`true` and `false` are booleans. Anchors and aliases are refused: `base:` does their work, and they
allow tiny files that expand without end.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from sqzjax.errors import ConfigError

_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_MAX_BYTES = 4 << 20


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2 scalars that collects duplicate keys in `duplicates`."""

    yaml_implicit_resolvers: dict = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.duplicates: list[str] = []

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not supported; use base: files",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} must be text; put it in quotes",
                    problem_mark=key_node.start_mark,
                )
            if key in mapping:
                self.duplicates.append(f"line {line}: key {key!r} is given twice; remove one")
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping

    def construct_int(self, node: Any) -> int:
        text = self.construct_scalar(node).replace("_", "")
        based = text.startswith(("0o", "0x"))
        return int(text, 0) if based else int(text)

    def construct_map(self, node: Any) -> dict[Any, Any]:
        return self.construct_mapping(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_map)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or our loader would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> Any:
        # Only double quotes keep Unicode's own line breaks; PyYAML folds them in other styles.
        quoted = any(character in data for character in "\x85\u2028\u2029\ufeff")
        tag = "tag:yaml.org,2002:str"
        return self.represent_scalar(tag, data, style='"' if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_text)

for _tag, (_pattern, _first) in _SCALARS.items():
    _regexp = re.compile(rf"(?:{_pattern})\Z")
    _letters = ["" if letter == "\0" else letter for letter in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regexp, _letters)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regexp, _letters)


def read_file(path: Path, included_by: Path | None = None) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty file is an empty mapping."""
    by = f" (base of {included_by})" if included_by else ""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise ConfigError(f"{path}{by}: larger than {_MAX_BYTES} bytes; is it a config file?")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}{by}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}{by}: must be UTF-8 text; {error}") from None
    data = read_text(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}{by}: must be a mapping of keys to values, got {data!r:.60}")
    return data


def read_text(text: str, name: str) -> Any:
    """Return the value of YAML text; `name` says in messages where it came from."""
    try:
        loader = _Loader(text)  # reads the first characters, which may be unprintable
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{name}: {_explain(error)}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    if loader.duplicates:
        raise ConfigError([f"{name}: {problem}" for problem in loader.duplicates])
    return data


def write(data: Any) -> str:
    """Return YAML text of plain dicts, lists and scalars."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _explain(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = error.problem or "not valid YAML"
    if "'\\t'" in problem:
        problem = "a tab cannot indent YAML; use spaces"
    return where + problem
