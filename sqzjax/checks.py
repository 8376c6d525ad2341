# SPDX-License-Identifier: Apache-2.0
"""What settings and arguments must be; configurations are read by the same rules.

Settings are checked where a policy is made, so that a dry run finds what a run would stop at.
"""

from collections.abc import Iterable
from functools import cache
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_count(name: str, value: Any, least: int, remedy: str = "") -> None:
    """Raise ValueError unless `value` is a whole number, not below `least`."""
    whole = isinstance(value, Integral)
    if not whole or value < least:
        rule = f"must be >= {least}" if whole else "must be a whole number"
        raise ValueError(f"{name}={value} {rule}" + (f"; {remedy}" if remedy else ""))


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that random keys are not made of as it stands."""
    if not 0 <= seed < 1 << 32:
        raise ValueError(
            f"seed={seed} must lie in [0, {1 << 32}); random keys have no more bits, and would be "
            "those of a smaller seed"
        )


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`, of which no number is a float."""
    choices = tuple(choices)
    if value not in choices or isinstance(value, float):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}")


def check_literals(policy: Any) -> None:
    """Raise ValueError unless every `Literal` field of a dataclass has one of its values."""
    for name, choices in _choices(type(policy)).items():
        check_choice(name, getattr(policy, name), choices)


@cache
def _choices(section: type) -> dict[str, tuple[Any, ...]]:
    found = {}
    for name, hint in get_type_hints(section).items():
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        values = [_values(option) for option in options]
        if all(values):
            found[name] = sum(values, ())
    return found


def _values(option: Any) -> tuple[Any, ...]:
    """Return the values that one option of a type allows, none if they are not listed."""
    if option is NoneType:
        return (None,)
    return get_args(option) if get_origin(option) is Literal else ()
