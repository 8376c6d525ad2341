# SPDX-License-Identifier: Apache-2.0
"""Turn raw data into the dataclasses of a schema, collecting every problem (see `sqzjax.config`).

Sections, unions and lists are walked here, so that each message has its path and one broken value
hides no other; single values are converted by pydantic's `TypeAdapter` in strict mode.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeAliasType, Union, get_args, get_origin, get_type_hints

from sqzjax.errors import ConfigError

KIND = "kind"


def options_of(schema: Any) -> tuple[Any, ...]:
    """Members of a union, or the type itself."""
    if isinstance(schema, TypeAliasType):
        return options_of(schema.__value__)
    if get_origin(schema) in (Union, UnionType):
        return tuple(option for member in get_args(schema) for option in options_of(member))
    return (schema,)


def sections_of(schema: Any) -> list[Any]:
    """Dataclasses among the members of a type."""
    return [option for option in options_of(schema) if dataclasses.is_dataclass(option)]


def nested_sections(schema: Any) -> list[Any]:
    """Sections of a field, also as items of a list."""
    inner = [s for s in options_of(schema) if get_origin(s) in (tuple, list)]
    return sections_of(schema) + [found for s in inner for found in sections_of(get_args(s)[0])]


@cache
def hints_of(section: Any) -> dict[str, Any]:
    """Types of a dataclass's fields."""
    return get_type_hints(section, include_extras=True)


def item_type(schema: Any) -> Any:
    """Type of a list's items; `Any` where there is none."""
    for option in options_of(schema):
        if get_origin(option) in (tuple, list):
            return get_args(option)[0]
    return Any


def key_types(schema: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Types of the keys that a mapping may have, as far as its `kind` decides them."""
    sections = sections_of(schema)
    chosen = [s for s in sections if data.get(KIND) in _tags(s)] or sections
    if chosen:
        return {key: hint for section in chosen for key, hint in hints_of(section).items()}
    for option in options_of(schema):
        if get_origin(option) is dict:
            return dict.fromkeys(data, get_args(option)[1])
    return {}


def _tags(section: Any) -> tuple[Any, ...]:
    hint = hints_of(section).get(KIND)
    return get_args(hint) if get_origin(hint) is Literal else ()


def default_of(field: dataclasses.Field) -> Any:
    """Default of a field, or `dataclasses.MISSING`."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


_CONTAINERS = (tuple, list, dict)
_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
_NAMES |= {NoneType: "null", Any: "anything", Path: "a path"}


def rule_of(schema: Any) -> str:
    """What a value must be, in words."""
    words = []
    for option in options_of(schema):
        origin, arguments = get_origin(option), get_args(option)
        if dataclasses.is_dataclass(option):
            words.append(f"a section ({', '.join(hints_of(option))})")
        elif origin is Literal:
            words.append("one of " + ", ".join(map(str, arguments)))
        elif origin in (tuple, list):
            words.append(f"a list, each item {rule_of(arguments[0])}")
        elif origin is dict:
            words.append(f"a mapping to {rule_of(arguments[1])}")
        else:
            words.append(_NAMES.get(option, str(option)))
    return " or ".join(words)


def show(value: Any) -> str:
    """A value in an error message, with its type where the text alone would mislead."""
    text = f"the text {value!r}" if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggest(word: Any, known: Sequence[Any]) -> str:
    """Return a question for the known word that is close to `word`, or nothing."""
    from difflib import get_close_matches

    close = get_close_matches(str(word), [str(item) for item in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@cache
def _leaf_reader(schema: Any) -> Callable[[str], Any]:
    from pydantic import ConfigDict, TypeAdapter

    # JSON mode is strict about scalars without refusing lists for tuples or text for paths.
    adapter = TypeAdapter(schema, config=ConfigDict(strict=True))
    return lambda text: adapter.validate_json(text, strict=True)


class Converter:
    """Turn raw data into schema instances, adding to `problems` instead of stopping."""

    def __init__(self, problems: list[str]):
        self.problems = problems

    def convert(self, schema: Any, value: Any, at: str, default: Any = None) -> Any:
        """Return `value` as an instance of `schema`; None and a problem where that fails.

        `default` is the field's default; a section given in part keeps the rest of it.
        """
        options = options_of(schema)
        if isinstance(value, Mapping):
            if sections := sections_of(schema):
                return self._section(sections, value, at, default)
            for option in options:
                if get_origin(option) is dict:
                    item = get_args(option)[1]
                    return {k: self.convert(item, v, _join(at, k)) for k, v in value.items()}
        elif isinstance(value, list | tuple):
            for option in options:
                if get_origin(option) in (tuple, list):
                    return self._items(option, value, at)
        # What is left is pydantic's: scalars, and containers that hold no sections.
        leaves = [
            o for o in options if o not in sections_of(o) and get_origin(o) not in _CONTAINERS
        ]
        if not leaves:
            return self._refuse(at, f"got {show(value)}; must be {rule_of(schema)}")
        return self._leaf(Union[tuple(leaves)], value, at, rule_of(schema))  # noqa: UP007

    def _refuse(self, at: str, text: str) -> None:
        self.problems.append(f"{at or 'top level'}: {text}")

    def _items(self, schema: Any, value: Sequence[Any], at: str) -> Any:
        types = [t for t in get_args(schema) if t is not Ellipsis]
        if get_origin(schema) is tuple and Ellipsis not in get_args(schema):
            if len(value) != len(types):
                return self._refuse(at, f"got {len(value)} items; must be {len(types)}")
        else:
            types = types * len(value)
        pairs = enumerate(zip(types, value, strict=True))
        items = [self.convert(kind, item, _join(at, index)) for index, (kind, item) in pairs]
        return tuple(items) if get_origin(schema) is tuple else items

    def _leaf(self, schema: Any, value: Any, at: str, rule: str) -> Any:
        from pydantic import ValidationError

        try:
            return _leaf_reader(schema)(json.dumps(value))
        except ValidationError as error:
            if hasattr(schema, "__metadata__"):
                rule = error.errors()[0]["msg"]
        except TypeError:  # not of YAML's types; only a mapping built in Python can hold it
            pass
        choices = [c for o in options_of(schema) if get_origin(o) is Literal for c in get_args(o)]
        if choices and isinstance(value, str):
            rule += _suggest(value, choices)
        self._refuse(at, f"got {show(value)}; must be {rule}{_hint(schema, value)}")

    def _section(self, sections: list[Any], data: Mapping[str, Any], at: str, default: Any) -> Any:
        section = self._choose(sections, data, at, default)
        if section is None:
            return None
        fields = {field.name: field for field in dataclasses.fields(section) if field.init}
        for key in data:
            if key not in fields:
                hint = _suggest(key, list(fields)) or f"; known: {', '.join(fields)}"
                self._refuse(_join(at, key), f"unknown key{hint}")
        values, bad = {}, set()
        for name, field in fields.items():
            hint = hints_of(section)[name]
            fallback = getattr(default, name) if type(default) is section else default_of(field)
            before = len(self.problems)
            if name in data:
                values[name] = self.convert(hint, data[name], _join(at, name), fallback)
            elif fallback is dataclasses.MISSING:
                self._refuse(_join(at, name), f"missing; must be {rule_of(hint)}")
            else:
                values[name] = fallback
            if len(self.problems) > before:
                bad.add(name)
        return self._build(section, values, bad, at)

    def _choose(
        self, sections: list[Any], data: Mapping[str, Any], at: str, default: Any
    ) -> Any | None:
        if len(sections) == 1:
            return sections[0]
        tags = {tag: section for section in sections for tag in _tags(section)}
        if KIND not in data and type(default) in sections:
            return type(default)
        kind = data.get(KIND)
        if isinstance(kind, str) and kind in tags:
            return tags[kind]
        found = f"got {show(kind)}" if KIND in data else "missing"
        hint = _suggest(kind, list(tags)) if KIND in data else ""
        self._refuse(_join(at, KIND), f"{found}; must be one of {', '.join(tags)}{hint}")
        return None

    def _build(self, section: Any, values: dict[str, Any], bad: set[str], at: str) -> Any:
        """Construct; after a broken rule, go on with that field's default to find the next."""
        while True:
            try:
                if not bad:
                    return section(**values)
                _probe(section, {k: v for k, v in values.items() if k not in bad})
                return None
            except ValueError as error:
                problems = error.problems if isinstance(error, ConfigError) else [str(error)]
            except Exception:
                if bad:
                    return None  # a rule needs the field that is missing
                raise
            words = [name for text in problems for name in re.findall(r"\w+", text)]
            if not bad.intersection(words):  # else it only repeats what is already reported
                for text in problems:
                    self._refuse(at, text)
            culprits = [name for name in words if name in values and name not in bad]
            if not culprits:
                return None
            bad.add(culprits[0])


def _probe(section: Any, values: dict[str, Any]) -> None:
    """Run the rules of a dataclass on what is known of it; other fields have their defaults."""
    probe = object.__new__(section)
    defaults = {field.name: default_of(field) for field in dataclasses.fields(section)}
    for name, value in {**defaults, **values}.items():
        if value is not dataclasses.MISSING:
            object.__setattr__(probe, name, value)
    getattr(probe, "__post_init__", lambda: None)()


def _hint(schema: Any, value: Any) -> str:
    """How to write what was probably meant."""
    options = options_of(schema)
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "y", "n"):
        return " (only true and false are booleans)" if bool in options else ""
    if str in options and isinstance(value, bool | int | float):
        return f"; put it in quotes: '{json.dumps(value)}'"
    return ""


def _join(at: str, key: Any) -> str:
    return f"{at}.{key}" if at else str(key)
