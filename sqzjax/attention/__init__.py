# SPDX-License-Identifier: Apache-2.0
"""Attention over segments of a context, masks on positions, rotary embedding.

The facade is lazy: configuration modules import `rope_config` without paying for jax.
"""

from typing import TYPE_CHECKING

from sqzjax._lazy import lazy

if TYPE_CHECKING:
    from sqzjax.attention.dense import attend
    from sqzjax.attention.mask import Mask
    from sqzjax.attention.partial import Partial, merge

__all__ = ["Mask", "Partial", "attend", "merge"]

__getattr__ = lazy(
    __name__, {"attend": "dense", "Mask": "mask", "Partial": "partial", "merge": "partial"}
)
