# SPDX-License-Identifier: Apache-2.0
"""The modules of a decoder block: Linen for naming and creating parameters, functions for maths."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sqzjax.attention import dense, rope
from sqzjax.attention.mask import Mask
from sqzjax.attention.partial import Partial, merge
from sqzjax.kvcache.base import KVCache, LayerParts, NewTokens, Query
from sqzjax.models.config import Execution, ModelConfig
from sqzjax.numerics import dot, rms_norm, swiglu
from sqzjax.typing import Array, PyTree

FITTED = "cache"
"""Name, beside an attention layer's parameters, of what its cache was fitted with."""
PROBES, WATCHED = "probes", "watched"
"""Collections of a calibration: what is added to keys and values, and the sums handed out."""


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    positions: Array  # B T
    segments: Array | None  # B T
    cos: Array  # B T H/2
    sin: Array  # B T H/2

    def of(self, rows: Array) -> "Context":
        """Return that of some tokens of each sequence, `[B, n]`; negative ones are padding."""
        at = jnp.maximum(rows, 0)
        positions = jnp.where(rows >= 0, jnp.take_along_axis(self.positions, at, axis=1), -1)
        angles = (jnp.take_along_axis(x, at[..., None], axis=1) for x in (self.cos, self.sin))
        return Context(positions, None, *angles)  # segments and caches exclude each other


class LayerInput(NamedTuple):
    """What differs between layers: the cache state, and the window where layers mix windows."""

    state: Any = None
    window: Any = None


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (arXiv 1910.07467)."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.dtype(self.param_dtype))
        return rms_norm(x, scale, self.eps)


class Linear(nn.Module):
    """`x @ kernel (+ bias) (+ x @ a @ b)`, the last from the `lora` collection if present."""

    features: int
    use_bias: bool
    param_dtype: str
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = jnp.dtype(self.param_dtype)
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.features), dtype)
        y = dot(x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), dtype)
            y = y + bias.astype(y.dtype)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y = y + dot(dot(x, a), b)
        return y


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions over an optional cache."""

    config: ModelConfig
    execution: Execution
    mask: Mask
    window: int | None
    policy: KVCache | None
    update_cache: bool
    in_order: bool = False

    def setup(self) -> None:
        config, dtype = self.config, self.execution.param_dtype
        kv_features = config.num_kv_heads * config.head_dim
        self.q = Linear(config.num_heads * config.head_dim, config.qkv_bias, dtype)
        self.k = Linear(kv_features, config.qkv_bias, dtype)
        self.v = Linear(kv_features, config.qkv_bias, dtype)
        # GPT-2's rule: the residual stream's variance stays independent of the depth.
        self.o = Linear(config.hidden_size, config.out_bias, dtype, 0.5 / config.num_layers)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.norm_eps, dtype)
            self.k_norm = RMSNorm(config.norm_eps, dtype)

    def project_kv(self, x: Array) -> tuple[Array, Array]:
        """Return keys before rotation and values of layer inputs `x`."""
        shape = (*x.shape[:-1], self.config.num_kv_heads, self.config.head_dim)
        k, v = self.k(x).reshape(shape), self.v(x).reshape(shape)
        k = self.k_norm(k) if self.config.qk_norm else k
        return self._watch("keys", k), self._watch("values", v)

    def _watch(self, name: str, x: Array) -> Array:
        """Hand `x` out, after adding a probe: the gradient of a probe of zeros is that of `x`."""
        if self.has_variable(PROBES, name):
            x = x + self.get_variable(PROBES, name)
        if not self.is_initializing():
            self.sow(WATCHED, name, x, init_fn=lambda: x, reduce_fn=lambda _, new: new)
        return x

    def finish_kv(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Return what `project_kv` makes of the bare products `[..., K, H]` with its kernels."""
        if self.config.qkv_bias:
            params = self.variables["params"]
            biases = (params[name]["bias"].reshape(k.shape[-2:]) for name in ("k", "v"))
            k, v = (y + bias.astype(y.dtype) for y, bias in zip((k, v), biases))
        return self.k_norm(k) if self.config.qk_norm else k, v

    def __call__(self, x: Array, context: Context, layer: LayerInput, carry: PyTree):
        config = self.config
        q = self.q(x).reshape(*x.shape[:-1], config.num_heads, config.head_dim)
        q = self.q_norm(q) if config.qk_norm else q
        k, v = self.project_kv(x)
        # What `KVCache.fit` made for this layer travels with its parameters.
        fitted = self.variables["params"].get(FITTED)
        if fitted is not None and {"k", "v"} & set(self.variables.get("lora", ())):
            raise ValueError(
                "the cache was fitted to the kernels of k and v, which lora changes; merge the "
                "adapter into the parameters before fit_cache, or leave k and v out of it"
            )
        query = Query(
            q=rope.rotate(q, context.cos, context.sin),
            q_pre=q,
            positions=context.positions,
            mask=self.mask,
            window=self.window if layer.window is None else layer.window,
            scale=1.0 / math.sqrt(config.head_dim),
            project_kv=self.project_kv,
            rotate=self._rotate_at,
            rotary=rope.rotary(config.rope, config.head_dim),
            finish_kv=self.finish_kv,
            carry=carry,
            fitted=fitted,
        )
        rotated = rope.rotate(k, context.cos, context.sin)
        new = NewTokens(rotated, v, k, x, context.positions, carry, fitted)
        part, state, carry = self._attend(query, new, context, layer.state)
        out = part.out.astype(x.dtype).reshape(*x.shape[:-1], -1)
        return self.o(out), state, carry

    def _attend(self, query: Query, new: NewTokens, context: Context, state: Any):
        if self.policy is None:
            return _attend_new(query, new, context, self.in_order), None, query.carry
        if self.update_cache:
            return self.policy.extend(
                state, new, query, lambda: _attend_new(query, new, context, False)
            )
        part, state, carry = self.policy.attend(state, query)
        return merge(part, _attend_new(query, new, context, False)), state, carry

    def _rotate_at(self, k: Array, positions: Array) -> Array:
        cos, sin = rope.angles(self.config.rope, self.config.head_dim, positions)
        return rope.rotate(k, cos, sin)


def _attend_new(query: Query, new: NewTokens, context: Context, in_order: bool) -> Partial:
    """Attend to the tokens of this forward pass only.

    Tokens `in_order` lie at positions 0, 1, ...: then the kernels of GPU and TPU libraries serve.
    """
    return dense.attend(
        query.q,
        new.k.transpose(0, 2, 1, 3),
        new.v.transpose(0, 2, 1, 3),
        query_positions=None if in_order else query.positions,
        key_positions=None if in_order else new.positions,
        mask=query.mask,
        window=query.window,
        scale=query.scale,
        query_segments=context.segments,
        key_segments=context.segments,
    )


class FeedForward(nn.Module):
    """Gated SiLU feed-forward (arXiv 2002.05202)."""

    config: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, dtype = self.config, self.execution.param_dtype
        gate = Linear(config.intermediate_size, config.mlp_bias, dtype, name="gate")(x)
        up = Linear(config.intermediate_size, config.mlp_bias, dtype, name="up")(x)
        down = Linear(
            config.hidden_size, config.mlp_bias, dtype, 0.5 / config.num_layers, name="down"
        )
        return down(swiglu(gate, up))


class Block(nn.Module):
    """Pre-norm decoder block; its call has the signature of a scan body."""

    config: ModelConfig
    execution: Execution
    mask: Mask
    window: int | None = None
    policy: KVCache | None = None
    update_cache: bool = True
    keep_input: bool = False
    in_order: bool = False

    def setup(self) -> None:
        config, execution = self.config, self.execution
        self.attn_norm = RMSNorm(config.norm_eps, execution.param_dtype)
        self.attn = Attention(
            config,
            execution,
            self.mask,
            self.window,
            self.policy,
            self.update_cache,
            self.in_order,
        )
        self.mlp_norm = RMSNorm(config.norm_eps, execution.param_dtype)
        self.mlp = FeedForward(config, execution)

    def __call__(self, stream: tuple[Array, PyTree], layer: LayerInput, context: Context):
        x, carry = stream
        kept = x if self.keep_input else None

        def attend(x, state, rows):
            seen = context if rows is None else context.of(rows)
            with jax.named_scope("attention"):
                return self.attn(self.attn_norm(x), seen, layer._replace(state=state), carry)

        def feed_forward(x):
            with jax.named_scope("feed_forward"):
                return self.mlp(self.mlp_norm(x))

        def values(x):
            return self.attn.v(self.attn_norm(x))

        parts = LayerParts(attend, feed_forward, values, context.positions)
        if self.policy is None or not self.update_cache:
            x, state, carry = parts.run(x, layer.state)
        else:
            x, state, carry = self.policy.layer(parts, x, layer.state)
        return (x, carry), (state, kept)
