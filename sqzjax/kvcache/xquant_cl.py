# SPDX-License-Identifier: Apache-2.0
"""XQuant-CL: code how a layer's input differs from the one below (arXiv 2508.10395, section 3.3).

Inputs of successive layers are alike, so their difference bears 2 bits where the inputs need 4. It
is taken against the reconstruction of the layer below, so errors do not add up: a layer's is that
of its own codes (and of rounding the accumulator). The first layers are coded by themselves; the
last of them is the base, whose reconstruction starts the accumulator that layers hand up as their
`carry`. Where few heads serve many queries, `delta U` is coded, U the left singular vectors of
[W_k | W_v]: the accumulator then keeps old values outside of the span of U, which W_k and W_v do
not see and which later deltas include.

Pick it when memory is everything: each step runs through an accumulator of all tokens at every
layer, as many bytes as the KV cache it replaces, and rebuilds keys as XQuant does. One accumulator
serves all layers; it lives during a step only (`accumulator_nbytes`).

Choices where the paper is silent: deltas live on the normed inputs, coded per token, latent ones
too; only keys and values come from reconstructions; prompts attend to their own tokens exactly,
later queries to what the codes give. Sliding-window layers keep all tokens, as the layers above
need them. Layers differ, so models run with `Execution(scan_layers=False)`.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sqzjax.attention.partial import Partial
from sqzjax.checks import check_count
from sqzjax.kvcache import rebuild, tiles
from sqzjax.kvcache.base import Attended, AttentionSpec, KVCache, LayerWeights, NewTokens, Query
from sqzjax.kvcache.coded import CodedCache, CodedState
from sqzjax.kvcache.xquant import (
    Form,
    XQuant,
    check_settings,
    factorise,
    is_latent,
    per_token,
    project,
    require,
)
from sqzjax.typing import Array, PyTree

_AGAIN = 4
"""Bits of an accumulator that is coded at every layer."""


@dataclass(frozen=True, kw_only=True)
class XQuantCL(CodedCache):
    """Codes of the change of X from layer to layer; `form` as in `XQuant`, of the changes.

    `first_layers` layers have `first_bits` bits and no delta; the last of them, coded in full
    width, is the base. `accumulator` "int4" codes it anew at every layer, deltas being taken
    against that: less traffic, larger deltas. All layers code a token in the same step, so they
    share `residual_length`; it is shorter than XQuant's because it weighs more against 2 bits.
    """

    kind: Literal["xquant_cl"] = "xquant_cl"
    bits: int = 2
    group_size: int = 128
    form: Form = "auto"
    residual_length: int = 32
    sinks: int = 0
    first_layers: int = 3
    first_bits: int = 4
    accumulator: Literal["bfloat16", "float32", "int4"] = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.bits, self.first_bits, self.group_size, self.first_layers)
        check_count("first_layers", self.first_layers, 1, "the last of them is the base")

    def layer_policy(self, index: int, num_layers: int) -> KVCache:
        if index >= self.first_layers:
            return self
        if index == self.first_layers - 1:
            return replace(self, bits=self.first_bits, form="input")  # the base: nothing below it
        return XQuant(
            bits=self.first_bits,
            group_size=self.group_size,
            form=self.form,
            residual_length=self.residual_length,
            sinks=self.sinks,
        )

    def fit(self, layer: LayerWeights) -> PyTree:
        if not is_latent(self.form, layer.k.shape[0], layer.num_kv_heads * layer.head_dim):
            return None
        both = jnp.concatenate([layer.k, layer.v], axis=1)
        return {"both": factorise(both)["down"]}

    def fitted_form(self, spec: AttentionSpec) -> PyTree:
        width = spec.num_kv_heads * spec.head_dim
        if not is_latent(self.form, spec.model_dim, width):
            return None
        shape = (1, spec.model_dim, min(spec.model_dim, 2 * width))
        return {"both": jnp.zeros(shape, spec.dtype)}

    def init(self, spec: AttentionSpec, batch: int) -> CodedState:
        return super().init(replace(spec, window=None), batch)

    def group(self, spec: AttentionSpec) -> int:
        form = self.fitted_form(spec)
        if self.bits != 16:
            width = spec.model_dim if form is None else form["both"].shape[-1]
            per_token(self.bits, self.group_size, width)
        if self.accumulator == "int4":
            per_token(_AGAIN, self.group_size, spec.model_dim)
        return 1

    def keep(self, new: NewTokens) -> PyTree:
        return {"x": new.x[:, None]}

    def encode_at(self, kept: PyTree, positions: Array, new: NewTokens) -> PyTree:
        x = kept["x"].astype(jnp.float32)
        if new.carry is not None:
            x -= _gather(new.carry, positions)
        return self.encode({"x": x}, new.fitted)

    def encode(self, kept: PyTree, fitted: PyTree) -> PyTree:
        delta, name = kept["x"], "x"
        if fitted is not None:
            delta, name = project(delta[:, 0], require(fitted, "both")["both"]), "both"
        if self.bits == 16:
            return {name: delta}
        return {name: per_token(self.bits, self.group_size, delta.shape[-1]).encode(delta)}

    def decode(self, codes: PyTree, kept: PyTree) -> PyTree:
        raise AssertionError("tokens are coded one by one: no group is ever cut in two")

    def attend(self, state: CodedState, query: Query) -> Attended:
        carry = self._accumulate(state, query)
        # Once coded anew it is less exact than its parts, which attention adds up for itself.
        seen = query.carry if self.accumulator == "int4" else carry
        return super().attend(state, query._replace(carry=seen))._replace(carry=carry)

    def attend_body(self, state: CodedState, query: Query, starts: Array, limits: Array) -> Partial:
        def read(start: Any) -> Array:
            if self.accumulator == "int4":
                return self._input(query.carry, state, start, query).astype(query.q.dtype)
            return _tile(query.carry, state, start).astype(query.q.dtype)

        source = rebuild.inputs(read, query, state)
        return rebuild.attend(source, query, state.coded, starts, limits)

    def exact(self, kept: PyTree, query: Query, positions: Array) -> tuple[Array, Array]:
        return rebuild.exact_inputs(kept["x"], query, positions)

    def accumulator_nbytes(self, spec: AttentionSpec, batch: int) -> int:
        """Return the bytes of the accumulator, of which a step holds one for all layers."""
        state = jax.eval_shape(lambda: self.init(spec, batch))
        shape = (batch, 1, state.slots, spec.model_dim)
        return self.nbytes(jax.eval_shape(lambda: self._empty(shape)))

    def _accumulate(self, state: CodedState, query: Query) -> PyTree:
        """Return the reconstruction of this layer's inputs, of the coded tokens."""
        block, carry = tiles.tile_size(state), query.carry
        if carry is None:
            form = jax.eval_shape(lambda: self._input(None, state, 0, query))
            carry = self._empty((form.shape[0], 1, state.slots, form.shape[-1]))

        def add(index, carry):
            start = index * block
            below = None if query.carry is None else carry
            tile = self._stored(self._input(below, state, start, query))
            return jax.tree.map(
                lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, start, axis=2),
                carry,
                tile,
            )

        count = (jnp.max(state.coded) + block - 1) // block
        return jax.lax.fori_loop(0, count, add, carry)

    def _input(self, below: PyTree, state: CodedState, start: Any, query: Query) -> Array:
        """Return a tile of the layer's inputs `[B, 1, S, D]` from the reconstruction below."""
        if "x" in state.body:
            delta = _tile(state.body["x"], state, start)
        else:
            delta = _tile(state.body["both"], state, start).astype(query.q.dtype)
            down = require(query.fitted, "both")["both"].astype(delta.dtype)
            delta = jnp.einsum("basw,adw->basd", delta, down, preferred_element_type=jnp.float32)
        return delta if below is None else _tile(below, state, start) + delta

    def _stored(self, x: Array) -> PyTree:
        if self.accumulator == "int4":
            return per_token(_AGAIN, self.group_size, x.shape[-1]).encode(x)
        return x.astype(self.accumulator)

    def _empty(self, shape: tuple[int, ...]) -> PyTree:
        form = jax.eval_shape(self._stored, jax.ShapeDtypeStruct(shape, jnp.float32))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), form)


def _tile(stored: PyTree, state: CodedState, start: Any) -> Array:
    """Return the float32 elements of the tile at slot `start`."""
    block = tiles.tile_size(state)
    return rebuild.elements(tiles.cut(stored, start, block, state.slots))


def _gather(stored: PyTree, positions: Array) -> Array:
    """Return the float32 rows `[B, 1, n, D]` of the tokens at `positions` `[B, n]`."""

    def take(leaf: Array) -> Array:
        place = positions % leaf.shape[2]
        return jnp.take_along_axis(leaf, place[:, None, :, None], axis=2)

    return rebuild.elements(jax.tree.map(take, stored))
