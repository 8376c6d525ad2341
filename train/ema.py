# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the trained parameters, kept in float32."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sqzjax.typing import PyTree


@dataclass(frozen=True)
class Average:
    """`average <- decay * average + (1 - decay) * params`, starting at the first parameters."""

    decay: float

    def init(self, params: PyTree) -> PyTree:
        """Return a copy (never an alias: both are donated)."""
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)

    def update(self, average: PyTree, params: PyTree) -> PyTree:
        """Return the average after one more step."""
        return jax.tree.map(
            lambda a, p: self.decay * a + (1.0 - self.decay) * p.astype(jnp.float32),
            average,
            params,
        )
