# SPDX-License-Identifier: Apache-2.0
"""What the one trainer must know about a kind of data and model: token rows, or gridded fields."""

from typing import Any

from train.families.base import Columns, Family
from train.families.language import Language

__all__ = ["Columns", "Family", "Language", "family_of"]


def family_of(config: Any) -> Family:
    """Return the family of a `TrainConfig`."""
    if config.family == "fields":
        from train.families.fields import Fields

        return Fields()
    return Language()
