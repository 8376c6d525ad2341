# SPDX-License-Identifier: Apache-2.0
"""Fit a cache policy to a model: what the method derives from weights or a calibration.

The arrays are put beside each attention layer's parameters, so they follow them through jit,
sharding and every decoder; the layer hands them to its cache.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.kvcache.base import KVCache, LayerWeights
from sqzjax.models.decoder import DecoderLM
from sqzjax.models.layers import FITTED
from sqzjax.models.layout import stack_layers, unstack_layers
from sqzjax.typing import Array, Params

_SAMPLES = 256
"""Of each parameter of a layer."""
_GOLDEN = 0.6180339887498949


def fit_cache(model: DecoderLM, params: Params, policy: KVCache) -> Params:
    """Return the parameters with what `policy` needs of each layer, in the layout of `model`.

    Policies that need nothing leave them as they are, and so do parameters fitted before. Raises
    ValueError, from the policy, where a calibration is missing or belongs to another model.
    """
    config = model.config
    policies = [policy.layer_policy(i, config.num_layers) for i in range(config.num_layers)]
    if all(type(own).fit is KVCache.fit for own in policies):
        return params
    layers = unstack_layers(params)
    if FITTED in layers["layers_0"]["attn"]:
        return params
    mark, found = fingerprint(model, params), []
    for index, own in enumerate(policies):
        attention = layers[f"layers_{index}"]["attn"]
        weights = LayerWeights(
            index,
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            attention["k"]["kernel"],
            attention["v"]["kernel"],
            mark,
        )
        found.append(own.fit(weights))
    if all(one is None for one in found):
        return params
    layers = dict(layers)
    for index, one in enumerate(found):
        name = f"layers_{index}"
        if one is not None:
            attention = {**layers[name]["attn"], FITTED: jax.tree.map(jnp.asarray, one)}
            layers[name] = {**layers[name], "attn": attention}
    return stack_layers(layers) if model.execution.scan_layers else layers


def fingerprint(model: DecoderLM, params: Params) -> str:
    """Return a digest of a model: its configuration and some numbers of every parameter.

    Weights are rounded to bfloat16 first, so it does not depend on the precision they were loaded
    in, nor on the layout of the layers. Special tokens and the length of the context do not count:
    a tokenizer or a longer run may set them. What `fit_cache` has added does not count either.
    """
    config = asdict(model.config)
    fields = [item for item in sorted(config.items()) if item[0] not in ("tokens", "max_positions")]
    digest = hashlib.sha256(repr(fields).encode())
    for path, numbers in sorted(_samples(params), key=lambda item: item[0]):
        # A sum over shards turns -0 into 0, so both count as 0.
        rounded = (np.asarray(numbers, np.float32) + 0.0).astype(jnp.bfloat16)
        digest.update(path.encode() + b"\0" + rounded.tobytes())
    return digest.hexdigest()


def _samples(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yield path, in the unrolled layout, and some numbers of each parameter of each layer."""
    taken = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if f"/attn/{FITTED}/" not in path:
            taken[path] = _take(leaf, path.startswith("layers/"))
    # All at once: one by one, each would wait for the device.
    for path, numbers in jax.device_get(taken).items():
        if not path.startswith("layers/"):
            yield path, numbers
            continue
        for index, row in enumerate(numbers):
            yield path.replace("layers/", f"layers_{index}/", 1), row


@partial(jax.jit, static_argnums=1)
def _take(leaf: Array, stacked: bool) -> Array:
    """Return up to `_SAMPLES` numbers of a parameter, of each layer of a stacked one `[L, n]`.

    One gather of single elements, of which each device that holds a part finds its own: a reshape
    or slice would collect the parameter first.
    """
    shape = leaf.shape[1:] if stacked else leaf.shape
    size = math.prod(shape)
    place = np.arange(min(size, _SAMPLES))
    if size > _SAMPLES:  # not in equal steps, which would be those of a column
        place = (place * (round(_GOLDEN * size) | 1)) % size
    index = np.unravel_index(place, shape)
    return leaf[(slice(None), *index)] if stacked else leaf[index]
