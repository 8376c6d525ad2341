# SPDX-License-Identifier: Apache-2.0
"""Blocks of the Swin emulator as functions of their parameters.

Tokens live in windows, `[B, rows of windows, columns of windows, T * wh * ww, E]`, from the patches
to the head: norms and products do not care, attention needs no copy, and only the shift of every
other block moves tokens. It moves them between neighbouring windows only, so on a mesh that splits
latitude and longitude it costs a permutation of the edges.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sqzjax.models.swin_config import SwinConfig
from sqzjax.numerics import MASK_VALUE, dot, rms_norm
from sqzjax.sharding_config import BATCH_AXES, SPATIAL_AXES
from sqzjax.typing import Array, Bool, Float, Params


def block(
    x: Float[Array, "B I J L E"], params: Params, config: SwinConfig, shifted: bool
) -> Float[Array, "B I J L E"]:
    """Return the residual stream after attention within (shifted) windows and feed-forward."""
    with jax.named_scope("attention"):
        h = rms_norm(x, params["attn_norm"]["scale"], config.norm_eps)
        allowed = None
        if shifted:
            h, allowed = shift(h, config), shifted_mask(config)
        h = window_attention(h, params["attn"], config, allowed)
        x = pin(x + (unshift(h, config) if shifted else h))
    with jax.named_scope("feed_forward"):
        h = rms_norm(x, params["mlp_norm"]["scale"], config.norm_eps)
        h = gelu(linear(h, params["mlp"]["up"]), config.gelu)
        return pin(x + linear(h, params["mlp"]["down"]))


def window_attention(
    x: Float[Array, "B I J L E"],
    params: Params,
    config: SwinConfig,
    allowed: Bool[Array, "I _ 1 L L"] | None = None,
) -> Float[Array, "B I J L E"]:
    """Attend within each window; keys where `allowed` is false are not seen.

    Queries and keys are normalised per head; scores and softmax are float32.
    """
    heads = (*x.shape[:-1], config.heads, config.head_dim)
    q, k, v = (linear(x, params[name]).reshape(heads) for name in "qkv")
    q = rms_norm(q, params["q_norm"]["scale"], config.norm_eps)
    k = rms_norm(k, params["k_norm"]["scale"], config.norm_eps)
    out = _attend(*(part.swapaxes(3, 4) for part in (q, k, v)), allowed)
    return linear(out.swapaxes(3, 4).reshape(x.shape), params["o"])


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, allowed: Array | None) -> Array:
    """Attend over `[B, I, J, N, L, H]`.

    The gradient is written out: it keeps the weights in the dtype of `v` and nothing else of their
    size, and a training step on CPU takes a twentieth less.
    """
    return _attend_and_keep(q, k, v, allowed)[0]


def _attend_and_keep(q: Array, k: Array, v: Array, allowed: Array | None):
    scores = _product("...qh,...kh->...qk", q, k) * (1.0 / math.sqrt(q.shape[-1]))
    if allowed is not None:
        scores = jnp.where(allowed, scores, MASK_VALUE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = _product("...qk,...kh->...qh", weights, v).astype(v.dtype)
    return out, (q, k, v, weights, out)


def _attend_gradient(kept: tuple[Array, ...], gradient: Array):
    q, k, v, weights, out = kept
    wide = gradient.astype(jnp.float32)
    inner = jnp.sum(out.astype(jnp.float32) * wide, axis=-1, keepdims=True)
    scores = weights.astype(jnp.float32) * (_product("...qh,...kh->...qk", gradient, v) - inner)
    scores = (scores * (1.0 / math.sqrt(q.shape[-1]))).astype(q.dtype)
    to_q = _product("...qk,...kh->...qh", scores, k)
    to_k = _product("...qk,...qh->...kh", scores, q)
    to_v = _product("...qk,...qh->...kh", weights, gradient)
    return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype), None


_attend.defvjp(_attend_and_keep, _attend_gradient)


def _product(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def shift(x: Float[Array, "B I J L E"], config: SwinConfig) -> Float[Array, "B I J L E"]:
    """Regroup tokens into windows that begin half a window further south and east."""
    x = _split_window(x, config)
    rows, columns = config.shift
    x = _from_next(x, rows, group=1, inside=4)
    return _from_next(x, columns, group=2, inside=5).reshape(*x.shape[:3], -1, x.shape[-1])


def unshift(x: Float[Array, "B I J L E"], config: SwinConfig) -> Float[Array, "B I J L E"]:
    """Undo `shift`."""
    x = _split_window(x, config)
    rows, columns = config.shift
    x = _from_previous(x, columns, group=2, inside=5)
    return _from_previous(x, rows, group=1, inside=4).reshape(*x.shape[:3], -1, x.shape[-1])


def shifted_mask(config: SwinConfig) -> Bool[Array, "I _ 1 L L"]:
    """Tell which tokens of each shifted window are neighbours on the sphere.

    In the last row of windows the last rows of tokens came from the other pole. A region that does
    not go round the globe has such an edge in longitude, too. The mask is a comparison of region
    numbers, one per token, which XLA fuses into the softmax: never an array of scores' size.
    """
    regions = jnp.asarray(_regions(config))
    return (regions[..., :, None] == regions[..., None, :])[:, :, None]


def _regions(config: SwinConfig) -> np.ndarray:
    """Return the region of each token, `[I, 1 or J, L]`."""
    (wh, ww), (rows, columns) = config.window_size, config.windows
    south = _beyond(rows, wh, config.shift[0])[:, None, None, :, None]
    east = _beyond(columns, ww, 0 if config.grid.periodic else config.shift[1])
    east = (east[:1] if config.grid.periodic else east)[None, :, None, None, :]
    regions = np.broadcast_to(south + 2 * east, (rows, east.shape[1], config.context, wh, ww))
    return regions.reshape(*regions.shape[:2], -1)


def _beyond(windows: int, size: int, moved: int) -> np.ndarray:
    """Mark the last `moved` places of the last window, which came round from the first."""
    marks = np.zeros((windows, size), np.int32)
    marks[-1, size - moved :] = 1
    return marks


def _split_window(x: Array, config: SwinConfig) -> Array:
    return x.reshape(*x.shape[:3], config.context, *config.window_size, x.shape[-1])


def _from_next(x: Array, count: int, group: int, inside: int) -> Array:
    """Drop the first `count` places of each window and append those of the next one."""
    if count == 0:
        return x
    first, rest = jnp.split(x, [count], axis=inside)
    return jnp.concatenate([rest, _rotate(first, -1, group)], axis=inside)


def _from_previous(x: Array, count: int, group: int, inside: int) -> Array:
    if count == 0:
        return x
    rest, last = jnp.split(x, [x.shape[inside] - count], axis=inside)
    return jnp.concatenate([_rotate(last, 1, group), rest], axis=inside)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _rotate(x: Array, by: int, axis: int) -> Array:
    """Roll windows by one; the gradient is a roll, too.

    JAX's own gradient adds padded pieces, in which the partitioner sees no rotation: it would move
    whole fields instead of the windows at the edge of a device.
    """
    return jnp.roll(x, by, axis=axis)


_rotate.defvjp(
    lambda x, by, axis: (_rotate(x, by, axis), None),
    lambda by, axis, _, gradient: (_rotate(gradient, -by, axis),),
)


def linear(x: Float[Array, "... I"], params: Params) -> Float[Array, "... O"]:
    """Return `x @ kernel`, plus the bias if there is one."""
    if _spatial_axes():
        # Flattened rows of a field that is split both ways could not stay where they are.
        kernel = params["kernel"].astype(x.dtype)
        y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)
    else:
        y = dot(x, params["kernel"])
    return y + params["bias"].astype(y.dtype) if "bias" in params else y


def gelu(x: Float[Array, "... F"], kind: str) -> Float[Array, "... F"]:
    """Return the exact Gaussian error linear unit or its tanh approximation."""
    return _erf_gelu(x) if kind == "erf" else jax.nn.gelu(x, approximate=True)


@jax.custom_vjp
def _erf_gelu(x: Array) -> Array:
    """Keep `x` alone for the gradient: JAX keeps the pieces of its formula, which costs 7 %."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _erf_gelu_gradient(x: Array, gradient: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) * (1.0 / math.sqrt(2 * math.pi))
    slope = _normal_cdf(wide) + wide * density
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


_erf_gelu.defvjp(lambda x: (_erf_gelu(x), x), _erf_gelu_gradient)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def pin(x: Array, axis: int = 1) -> Array:
    """Keep samples on the batch axes of the mesh, and axes `axis`, `axis + 1` on lat and lon.

    Left free, the partitioner splits the stream like the parameters and repeats the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch = tuple(name for name in BATCH_AXES if name in mesh.auto_axes)
    spatial = _spatial_axes()
    ways = math.prod(mesh.shape[name] for name in batch)
    if ways * math.prod(mesh.shape[name] for name in spatial) == 1:
        return x
    spec: list = [None] * x.ndim
    if x.shape[0] % ways == 0:
        spec[0] = batch
    if spatial:
        spec[axis : axis + 2] = spatial
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _spatial_axes() -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in SPATIAL_AXES if name in mesh.auto_axes)
