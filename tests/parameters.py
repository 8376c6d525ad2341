# SPDX-License-Identifier: Apache-2.0
"""Random parameters of a decoder drawn by numpy: compiling `init_params` takes most of a second."""

from typing import Any

import jax
import numpy as np

from sqzjax.models import DecoderLM


def drawn(model: DecoderLM, seed: int = 0, scale: float = 1.0) -> Any:
    """Return parameters with the distribution of `model.init_params`, in its layout.

    `scale`: a factor of every leaf; larger weights make outputs depend more on all of the input.
    """
    rng = np.random.default_rng(seed)
    config = model.config

    def leaf(path: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        module, name = path[-2].key, path[-1].key
        if name in ("scale", "bias"):
            made = np.full(wanted.shape, float(name == "scale"))
        else:
            # A table of embeddings is tied to the head, or has variance 1.
            inputs = config.hidden_size if name == "embedding" else wanted.shape[-2]
            deviation = inputs**-0.5 if name == "kernel" or config.tie_embeddings else 1.0
            if module in ("o", "down"):
                deviation *= (2 * config.num_layers) ** -0.5
            made = deviation * rng.normal(size=wanted.shape)
        return jax.device_put((scale * made).astype(wanted.dtype))

    return jax.tree.map_with_path(leaf, model.abstract_params())
