# SPDX-License-Identifier: Apache-2.0
"""Fit a cache policy to a model: what the method derives from weights or a calibration.

The arrays are put beside each attention layer's parameters, so they follow them through jit,
sharding and every decoder; the layer hands them to its cache.
"""

import hashlib
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.kvcache.base import KVCache, LayerWeights
from sqzjax.models.decoder import DecoderLM
from sqzjax.models.layers import FITTED
from sqzjax.models.layout import stack_layers, unstack_layers
from sqzjax.typing import Params

_SAMPLES = 256


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
    """Return a digest of a model: its configuration and some key projections of every layer.

    Weights are rounded to bfloat16 first, so it does not depend on the precision they were loaded
    in, nor on the layout of the layers. Special tokens and the length of the context do not count:
    a tokenizer or a longer run may set them.
    """
    config = asdict(model.config)
    fields = [item for item in sorted(config.items()) if item[0] not in ("tokens", "max_positions")]
    digest = hashlib.sha256(repr(fields).encode())
    layers: dict[str, Any] = unstack_layers(params)
    for index in range(model.config.num_layers):
        kernel = layers[f"layers_{index}"]["attn"]["k"]["kernel"].reshape(-1)
        some = kernel[:: max(kernel.size // _SAMPLES, 1)].astype(jnp.bfloat16)
        digest.update(np.asarray(some).tobytes())
    return digest.hexdigest()
