# SPDX-License-Identifier: Apache-2.0
"""Array types used in public signatures.

Letters, fixed for the whole repository: `B` batch, `T` query tokens, `S` cache slots, `N` query
heads, `K` key/value heads, `G` = N/K, `H` head dim, `D` model dim, `F` feed-forward dim, `V`
vocabulary (embedding rows), `L` layers.
"""

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int, Shaped
from jaxtyping import Key as _Key

Key = _Key[Array, ""]
"""A typed scalar PRNG key (`jax.random.key`)."""

Leaf = Any
"""Field of a pytree dataclass: tree transformations put tracers, shardings or None there, so the
shape stands in the field's comment instead of a checked annotation."""

PyTree = Any
Params = dict[str, Any]
"""Nested dict of arrays."""

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Leaf", "Params", "PyTree", "Shaped"]
