# SPDX-License-Identifier: Apache-2.0
"""Archives of gridded fields: reading, channels, samples, statistics. Nothing here imports jax."""

from typing import TYPE_CHECKING

from sqzjax._lazy import lazy
from sqzjax.fields.periods import Period

if TYPE_CHECKING:
    from sqzjax.fields.archive import Archive, open_archive
    from sqzjax.fields.states import States
    from sqzjax.fields.statistics import Statistics, statistics_for

__all__ = ["Archive", "Period", "States", "Statistics", "open_archive", "statistics_for"]

__getattr__ = lazy(
    __name__,
    {
        "Archive": "archive",
        "open_archive": "archive",
        "States": "states",
        "Statistics": "statistics",
        "statistics_for": "statistics",
    },
)
