# SPDX-License-Identifier: Apache-2.0
"""Lay parameters out for decoding, once, before the first request.

Decoding reads all weights for every token, so what a training layout costs, it costs each time:
layers are unrolled (no layer's cache is sliced out of a stack) and weights cast to the compute
dtype. Nothing here changes a result.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from sqzjax.models import DecoderLM, unstack_layers
from sqzjax.typing import Params


def prepare(model: DecoderLM, params: Params) -> tuple[DecoderLM, Params]:
    """Return model and parameters in the layout and dtype that decode fastest.

    Parameters that have them already are passed on, not copied.
    """
    dtype = jnp.dtype(model.execution.dtype)
    execution = replace(model.execution, scan_layers=False, remat="none")
    params = unstack_layers(params)
    return DecoderLM(model.config, execution), jax.tree.map(lambda x: _cast(x, dtype), params)


def _cast(leaf, dtype):
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
