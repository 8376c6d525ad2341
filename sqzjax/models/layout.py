# SPDX-License-Identifier: Apache-2.0
"""Convert between stacked (`layers/...`, axis 0 = layer) and unrolled (`layers_0/...`) trees.

Works on parameters, adapters and anything else that mirrors them.
"""

import jax
import jax.numpy as jnp

from sqzjax.typing import Params


def stack_layers(params: Params) -> Params:
    """Return the stacked layout; a tree that has it already is returned as it is."""
    names = sorted((n for n in params if n.startswith("layers_")), key=lambda n: int(n[7:]))
    if not names:
        return params
    rest = {name: value for name, value in params.items() if name not in names}
    layers = [params[name] for name in names]
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Params) -> Params:
    """Return the unrolled layout; a tree that has it already is returned as it is."""
    if "layers" not in params:
        return params
    rest = {name: value for name, value in params.items() if name != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    for index in range(count):
        rest[f"layers_{index}"] = jax.tree.map(lambda leaf, i=index: leaf[i], params["layers"])
    return rest
