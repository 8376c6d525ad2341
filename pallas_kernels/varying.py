# SPDX-License-Identifier: Apache-2.0
"""Types of kernel outputs that also hold inside `jax.shard_map`."""

import jax
import jax.numpy as jnp
from jax import Array


def float32_output(shape: tuple[int, ...], *inputs: Array) -> jax.ShapeDtypeStruct:
    """Return a float32 output type that differs between devices wherever one of `inputs` does.

    `shard_map` wants that said of the outputs of an opaque kernel. The name of the field that says
    it depends on the version of jax; the type of a sum over all inputs has it under any name.
    """

    def spread(*arrays):
        return jnp.broadcast_to(sum(x.reshape(-1)[0].astype(jnp.float32) for x in arrays), shape)

    return jax.eval_shape(spread, *inputs)
