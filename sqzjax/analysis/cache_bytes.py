# SPDX-License-Identifier: Apache-2.0
"""Bytes of a model's caches at any length, from the shapes that `init` would allocate.

Right for asking whether ten million tokens fit before buying the memory: states are evaluated as
shapes, so nothing is allocated whatever the length, and every array counts, codes, scales, exact
windows, lengths and all. What a calibration puts beside the parameters (`KVCache.fit`) is no part
of a cache and does not grow with it. A layer takes milliseconds; equal layers are evaluated once.
"""

import math
from collections import Counter
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh

from sqzjax.kvcache import AttentionSpec, CacheStates, KVCache
from sqzjax.models.config import Execution, ModelConfig
from sqzjax.models.decoder import DecoderLM
from sqzjax.sharding import cache_shardings
from sqzjax.sharding_config import AXES, MeshConfig


@dataclass(frozen=True, kw_only=True)
class CacheBytes:
    """Size of the caches of `batch` sequences of `context` tokens.

    `elements` are the numbers that a cache of every key and value would hold; `device_total` are
    the bytes of one device where the cache is spread over `devices` of them.
    """

    context: int
    batch: int
    total: int
    elements: int
    devices: int
    device_total: int

    @property
    def per_token(self) -> float:
        """Return the bytes of a token over all layers."""
        return self.total / (self.batch * self.context)

    @property
    def average_bits(self) -> float:
        """Return the bits per key or value element, everything counted."""
        return 8 * self.total / self.elements

    @property
    def compression(self) -> float:
        """Return how many times smaller than 16-bit keys and values the cache is."""
        return 16 / self.average_bits


def cache_bytes(
    model: ModelConfig,
    policy: KVCache,
    *,
    context: int,
    batch: int = 1,
    max_new: int = 1,
    dtype: str = "bfloat16",
    mesh: MeshConfig = MeshConfig(data=1),
) -> CacheBytes:
    """Return the size of a model's caches under a policy; `dtype` is that of exact keys and values.

    On a mesh, sequences are split over the batch axes and kv heads over `tensor` as at run time
    (`sqzjax.sharding.cache_shardings`): what does not divide stays whole on every device.
    """
    if -1 in (mesh.data, mesh.fsdp, mesh.tensor):
        raise ValueError(f"mesh={mesh} must give every axis a size; there are no devices to count")
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    abstract = AbstractMesh(sizes, AXES)
    total = device_total = 0
    for (own, spec), count in layer_kinds(
        model, policy, context=context, max_new=max_new, dtype=dtype
    ).items():
        state = jax.eval_shape(lambda own=own, spec=spec: own.init(spec, batch))
        placed = cache_shardings(CacheStates((state,), (own,)), abstract, model.num_kv_heads)
        for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
            total += count * leaf.size * leaf.dtype.itemsize
            shard = math.prod(where.shard_shape(leaf.shape))
            device_total += count * shard * leaf.dtype.itemsize
    width = model.num_layers * model.num_kv_heads * model.head_dim
    return CacheBytes(
        context=context,
        batch=batch,
        total=total,
        elements=2 * batch * context * width,
        devices=math.prod(sizes),
        device_total=device_total,
    )


def layer_kinds(
    model: ModelConfig, policy: KVCache, *, context: int, max_new: int, dtype: str
) -> Counter[tuple[KVCache, AttentionSpec]]:
    """Return the different pairs of policy and spec among a model's layers, and how many of each.

    ValueError, from the policies, for settings that do not suit the model.
    """
    execution = Execution(dtype=dtype, scan_layers=False)  # type: ignore[arg-type]
    specs = DecoderLM(model, execution).cache_specs(capacity=context, max_new=max_new)
    return Counter(
        (policy.layer_policy(index, len(specs)), spec) for index, spec in enumerate(specs)
    )
