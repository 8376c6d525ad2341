# SPDX-License-Identifier: Apache-2.0
"""XQuant: cache the coded input X of attention layers, make K and V again (arXiv 2508.10395).

One tensor in place of two, and X bears few bits better than K and V do: half the memory of a coded
KV cache for multi-head models. Where few heads serve many queries, X is wider than K and V
together; then `X U_k` and `X U_v` are stored, U the left singular vectors of the projections: as
large as K and V, but easier to code. Nothing is calibrated. The price is arithmetic: a step
multiplies all tokens by W_k again (latents: by a `[K H, K H]` matrix), which beyond some 2,000
tokens takes longer than reading a KV cache would (`sqzjax.analysis.rebuild`). Pick it when memory
is the limit. Bytes per token and layer: `(bits + 32 / group_size) / 8` per element.

Prompts attend to their own tokens exactly; every later query sees rebuilt keys and values. Rounding
is half to even and scales and offsets are float16 (the paper does not say; its memory figures fit).
Tensor parallelism replicates X; with `shards` each device's heads have latents of their own.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from sqzjax.attention.partial import Partial
from sqzjax.checks import check_choice, check_count
from sqzjax.kvcache import rebuild, tiles
from sqzjax.kvcache.base import AttentionSpec, LayerWeights, NewTokens, Query
from sqzjax.kvcache.coded import CodedCache, CodedState
from sqzjax.numerics import half
from sqzjax.quant import Uniform
from sqzjax.quant.uniform import check_width
from sqzjax.typing import Array, Float, PyTree

Form = Literal["auto", "input", "latent"]
BITS = (2, 3, 4, 8, 16)
_FACTORS = 1e-5
"""Largest relative error of a factorisation, before it is cast."""


@dataclass(frozen=True, kw_only=True)
class XQuant(CodedCache):
    """Codes of X per token ("input"), or of X U_k per channel and X U_v per token ("latent").

    `form` "auto" takes the inputs where they are narrower than keys and values together. `bits` 16
    stores them uncoded: exact, and for multi-head models half of a KV cache. Groups hold
    `group_size` channels or tokens; a width below that is one group. Groups of tokens have to fill
    up, so of latents up to `residual_length + group_size - 1` tokens are uncoded. `exact_first`
    keeps channel 0 of X U_k, where its outliers are, in float16 (App. B). The first `first_layers`
    layers have `first_bits` bits; that needs `Execution(scan_layers=False)`.
    """

    kind: Literal["xquant"] = "xquant"
    bits: int = 4
    group_size: int = 128
    form: Form = "auto"
    residual_length: int = 128
    sinks: int = 0
    shards: int = 1
    exact_first: bool = False
    first_layers: int = 0
    first_bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.bits, self.first_bits, self.group_size, self.first_layers)
        check_count("shards", self.shards, 1, "use a divisor of the kv heads")

    def layer_policy(self, index: int, num_layers: int) -> "XQuant":
        bits = self.first_bits if index < self.first_layers else self.bits
        return replace(self, bits=bits, first_layers=0)

    def fit(self, layer: LayerWeights) -> PyTree:
        if not is_latent(self.form, layer.k.shape[0], layer.num_kv_heads * layer.head_dim):
            return None
        self._check_shards(layer.num_kv_heads)
        return {"k": factorise(layer.k, self.shards), "v": factorise(layer.v, self.shards)}

    def fitted_form(self, spec: AttentionSpec) -> PyTree:
        width = spec.num_kv_heads * spec.head_dim
        if not is_latent(self.form, spec.model_dim, width):
            return None
        part = width // self.shards
        rank = min(spec.model_dim, part)
        down, up = (self.shards, spec.model_dim, rank), (self.shards, rank, part)
        zeros = {"down": jnp.zeros(down, spec.dtype), "up": jnp.zeros(up, spec.dtype)}
        return {"k": zeros, "v": zeros}

    def group(self, spec: AttentionSpec) -> int:
        self._check_shards(spec.num_kv_heads)
        width = spec.num_kv_heads * spec.head_dim
        latent = is_latent(self.form, spec.model_dim, width)
        if self.bits == 16:
            return 1
        coded = min(spec.model_dim, width // self.shards) if latent else spec.model_dim
        per_token(self.bits, self.group_size, coded)
        return self.group_size if latent else 1

    def keep(self, new: NewTokens) -> PyTree:
        if not is_latent(self.form, new.x.shape[-1], math.prod(new.k.shape[-2:])):
            return {"x": new.x[:, None]}
        fitted = require(new.fitted, "k", "v")
        return {name: project(new.x, fitted[name]["down"]) for name in ("k", "v")}

    def encode(self, kept: PyTree, fitted: PyTree) -> PyTree:
        codes = {name: self._code(name, x) for name, x in kept.items()}
        if self.exact_first and "k" in kept:
            codes["first"] = half(kept["k"][..., :1])
        return codes

    def decode(self, codes: PyTree, kept: PyTree) -> PyTree:
        return {name: _elements(codes, name, x.dtype) for name, x in kept.items()}

    def attend_body(self, state: CodedState, query: Query, starts: Array, limits: Array) -> Partial:
        def read(name: str, start: Any) -> Array:
            tile = {
                key: tiles.cut(leaf, start, tiles.tile_size(state), state.slots)
                for key, leaf in state.body.items()
            }
            return _elements(tile, name, query.q.dtype)

        if "x" in state.body:
            source = rebuild.inputs(lambda start: read("x", start), query, state)
        else:
            source = _latents(read, query, state)
        return rebuild.attend(source, query, state.coded, starts, limits)

    def exact(self, kept: PyTree, query: Query, positions: Array) -> tuple[Array, Array]:
        if "x" in kept:
            return rebuild.exact_inputs(kept["x"], query, positions)
        fitted, width = require(query.fitted, "k", "v"), query.q.shape[-1]
        k, v = (_expand(kept[name], fitted[name]["up"], width) for name in ("k", "v"))
        return rebuild.headed(query, *_finish(query, k, v), positions)

    def _code(self, name: str, x: Array) -> Any:
        if self.bits == 16:
            return x
        if name == "k":
            return Uniform(bits=self.bits, axis="channel", group_size=self.group_size).encode(x)
        return per_token(self.bits, self.group_size, x.shape[-1]).encode(x)

    def _check_shards(self, num_kv_heads: int) -> None:
        if num_kv_heads % self.shards:
            divisors = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
            raise ValueError(
                f"shards={self.shards} must divide the {num_kv_heads} kv heads; use one of "
                f"{divisors}"
            )


def is_latent(form: Form, model_dim: int, kv_width: int) -> bool:
    """Whether latents are stored: asked for, or no wider than the inputs of `model_dim`."""
    return form == "latent" or (form == "auto" and model_dim >= 2 * kv_width)


def check_settings(bits: int, first_bits: int, group_size: int, first_layers: int) -> None:
    """Raise ValueError for settings that no layer could have."""
    for name, value in (("bits", bits), ("first_bits", first_bits)):
        check_choice(name, value, BITS)
    check_count("group_size", group_size, 1, "128 is usual")
    check_count("first_layers", first_layers, 0)


def per_token(bits: int, group_size: int, width: int) -> Uniform:
    """Return the quantizer of rows of `width` channels; narrower rows are one group.

    Raises ValueError if groups do not divide the width.
    """
    group_size = 0 if width <= group_size else group_size
    check_width("token", group_size, width)
    return Uniform(bits=bits, group_size=group_size)


def require(fitted: PyTree, *names: str) -> PyTree:
    """Return what `fit` made; ValueError where it is missing or another policy's."""
    if not isinstance(fitted, dict) or set(fitted) != set(names):
        found = "nothing" if fitted is None else sorted(fitted)
        raise ValueError(
            f"this cache needs the factors {sorted(names)} of the layer's projections and was given"
            f" {found}; make them with sqzjax.models.fit_cache from parameters not fitted before"
        )
    return fitted


def factorise(kernel: Array, shards: int = 1) -> dict[str, np.ndarray]:
    """Return `down` `[A, D, W]`, orthonormal, and `up` `[A, W, F / A]`: `down @ up` = kernel.

    The thin SVD of each of A = `shards` blocks of the columns of a kernel `[D, F]`, in float64 on
    the host; returned in the kernel's dtype. Column 0 of `down` is the direction of the largest
    singular value, where the outliers of all tokens gather.
    """
    wide = np.asarray(kernel, np.float64)
    blocks = np.stack(np.split(wide, shards, axis=1))
    u, s, vt = np.linalg.svd(blocks, full_matrices=False)
    up = s[..., None] * vt
    if not np.linalg.norm(u @ up - blocks) <= _FACTORS * np.linalg.norm(blocks):
        raise ValueError("the singular vectors of a key or value projection do not give it back")
    return {"down": u.astype(kernel.dtype), "up": up.astype(kernel.dtype)}


def project(x: Float[Array, "B T D"], down: Float[Array, "A D W"]) -> Float[Array, "B A T W"]:
    """Return the latents of inputs, accumulated in float32."""
    down = down.astype(x.dtype)
    out = jnp.einsum("btd,adw->batw", x, down, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


def channel_energy(latents: Float[Array, "... W"]) -> Float[Array, "W"]:
    """Return the share of each channel in the sum of squares."""
    squares = jnp.square(latents.astype(jnp.float32)).reshape(-1, latents.shape[-1])
    return jnp.sum(squares, axis=0) / jnp.sum(squares)


def _elements(codes: PyTree, name: str, dtype: Any) -> Array:
    """Return some rows of the stored tensor `name`."""
    rows = rebuild.elements(codes[name], dtype)
    if name == "k" and "first" in codes:
        rows = jnp.concatenate([codes["first"].astype(dtype), rows[..., 1:]], axis=-1)
    return rows


def _latents(read: Any, query: Query, state: CodedState) -> rebuild.Source:
    """Return the source that expands latents, `read(name, start)` giving `[B, A, S, W]`."""
    fitted, head_dim = require(query.fitted, "k", "v"), query.q.shape[-1]
    up = fitted["v"]["up"]
    ways, width, part = up.shape
    heads = ways * part // head_dim

    def expanded(name: str, start: Any) -> Array:
        return _expand(read(name, start), fitted[name]["up"], head_dim)

    def lift(mixed: Array) -> Array:
        batch, length, queries, _ = mixed.shape
        # Heads lead: XLA on CPU has no bfloat16 products of other batches.
        mine = jnp.moveaxis(mixed.reshape(batch, length, heads, -1, width), 2, 0)
        own = up.astype(mixed.dtype).reshape(ways, width, -1, head_dim)
        own = jnp.moveaxis(own, 2, 1).reshape(heads, width, head_dim)
        v = jnp.einsum("kbtgw,kwh->kbtgh", mine, own, preferred_element_type=jnp.float32)
        v = jnp.moveaxis(v, 0, 3)
        v = _finish(query, v, v)[1]
        return jnp.moveaxis(v, 3, 2).reshape(batch, length, queries, head_dim)

    def keys(start: Any) -> Array:
        k = expanded("k", start)
        return _finish(query, k, k)[0]

    def values(start: Any) -> Array:
        v = expanded("v", start)
        return _finish(query, v, v)[1]

    return rebuild.Source(
        keys=keys,
        rows=lambda start: read("v", start),
        values=values,
        lift=lift,
        num_kv_heads=heads,
        ways=ways,
        width=width,
        slots=state.slots,
        block=tiles.tile_size(state),
    )


def _expand(latents: Array, up: Array, head_dim: int) -> Array:
    """Return the bare products `[B, S, K, H]` of latents `[B, A, S, W]`."""
    up = up.astype(latents.dtype)
    batch, _, slots, _ = latents.shape
    mine = jnp.moveaxis(latents, 1, 0)  # see `lift`
    out = jnp.einsum("absw,awp->absp", mine, up, preferred_element_type=jnp.float32)
    out = jnp.moveaxis(out, 0, 2).astype(latents.dtype)
    return out.reshape(batch, slots, -1, head_dim)


def _finish(query: Query, k: Array, v: Array) -> tuple[Array, Array]:
    return (k, v) if query.finish_kv is None else query.finish_kv(k, v)
