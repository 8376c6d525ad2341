# SPDX-License-Identifier: Apache-2.0
"""Exceptions a user can provoke; all are `ValueError`s that name value, rule and remedy."""

import errno
from collections.abc import Iterable

DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
)
"""Numbers of an `OSError` that tell of the user's disk or its permissions, not of a fault here."""


class ConfigError(ValueError):
    """One or more problems in a configuration; `problems` lists every one of them."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(ValueError):
    """A checkpoint, on disk, is missing, damaged or belongs to another model."""


class DataError(ValueError):
    """A data file or data state cannot be used as asked."""


class RequestError(ValueError):
    """A generation or evaluation request is outside what the model accepts."""
