# SPDX-License-Identifier: Apache-2.0
"""The one decoder: every supported family is this definition under another `ModelConfig`.

`DecoderLM` is frozen and hashable; parameters, caches and adapters are arguments and results.
Training runs the layers as a scan over stacked parameters; decoding prefers them unrolled
(`Execution(scan_layers=False)`), where each layer's cache is updated in place.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sqzjax.attention import rope
from sqzjax.attention.mask import Mask
from sqzjax.checks import check_choice, check_count
from sqzjax.kvcache.base import AttentionSpec, KVCache
from sqzjax.kvcache.states import CacheStates, check_new, init_states
from sqzjax.models.config import Execution, ModelConfig
from sqzjax.models.layers import Block, Context, LayerInput, RMSNorm
from sqzjax.numerics import vocabulary_dot
from sqzjax.sharding_config import AXES
from sqzjax.typing import Array, Float, Int, Key, Params, PyTree

Rows = Literal["all", "none"]
Hidden = Literal["none", "last", "all"]
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class DecoderOutput(NamedTuple):
    """Result of a forward pass; what was not asked for is None.

    `logits` float32 `[B, T, V]` (`[B, 1, V]` for chosen rows), V the padded `embedding_size`.
    `hidden`: `[B, T, D]` after the final norm ("last"), or `[L + 1, B, T, D]` holding the input of
    each layer and the final-norm output ("all").
    """

    logits: Array | None
    hidden: Array | None
    caches: CacheStates | None


class DecoderLM(nn.Module):
    """A decoder language model; see `forward`."""

    config: ModelConfig
    execution: Execution = Execution()

    def init_params(self, key: Key) -> Params:
        """Create parameters: normal with fan-in variance, residual outputs scaled by 1/sqrt(2L)."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        return nn.unbox(self.init(key, tokens))["params"]

    def abstract_params(self) -> PyTree:
        """Return shapes and dtypes of the parameters without allocating them."""
        return jax.eval_shape(self.init_params, jax.random.key(0))

    def init_caches(
        self, policy: KVCache, *, batch: int, capacity: int, max_new: int
    ) -> CacheStates:
        """Return empty caches for `capacity` tokens a sequence, at most `max_new` per forward.

        Layers with a sliding window hold little more than it: a forward of more new tokens than
        they can take raises ValueError, unless the tokens are the first ones and fit.
        """
        for name, value in (("batch", batch), ("capacity", capacity), ("max_new", max_new)):
            check_count(name, value, 1)
        specs = self.cache_specs(capacity=capacity, max_new=max_new)
        return init_states(policy, specs, batch, stacked=self.execution.scan_layers)

    def cache_specs(self, *, capacity: int, max_new: int) -> tuple[AttentionSpec, ...]:
        """Return what each layer's cache must hold."""
        windows = self.config.layer_windows
        if self.execution.scan_layers and len(set(windows)) > 1:
            windows = (None,) * len(windows)  # one stacked state cannot mix rings and full caches
        return tuple(
            AttentionSpec(
                num_heads=self.config.num_heads,
                num_kv_heads=self.config.num_kv_heads,
                head_dim=self.config.head_dim,
                model_dim=self.config.hidden_size,
                capacity=capacity,
                max_new=min(max_new, capacity),
                window=window,
                dtype=self.execution.dtype,
            )
            for window in windows
        )

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "B T"] | None = None,
        *,
        embeds: Float[Array, "B T D"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Mask | None = None,
        caches: CacheStates | None = None,
        update_cache: bool = True,
        logits: Rows | Int[Array, "B"] = "all",
        return_hidden: Hidden = "none",
        lora: PyTree = None,
    ) -> DecoderOutput:
        """Run the decoder on token ids or embeddings.

        `positions` default to 0..T-1; a negative one marks padding, which is neither seen nor
        cached. `segment_ids` separate documents packed into a row (without caches). With
        `caches`, new tokens are written at their positions and attend to everything held;
        `update_cache=False` attends to the caches and the new tokens and stores nothing.
        `logits`: all rows, none, or one row index per sequence. `lora` mirrors the linear layers'
        paths with leaves `a [in, r]`, `b [r, out]` (scale folded into `b`).
        """
        if (tokens is None) == (embeds is None):
            raise ValueError("give exactly one of tokens and embeds")
        if segment_ids is not None and caches is not None:
            raise ValueError("segment_ids cannot be combined with caches; use one row per document")
        if mask is not None and mask.kind == "noisy_clean" and (positions is None or caches):
            raise ValueError(
                "mask.kind='noisy_clean' needs positions, those of the text twice, and no caches"
            )
        variables = {"params": params} if lora is None else {"params": params, "lora": lora}
        return self.apply(  # type: ignore[return-value]
            variables,
            tokens,
            embeds,
            positions=positions,
            segment_ids=segment_ids,
            mask=mask,
            caches=caches,
            update_cache=update_cache,
            logits=logits,
            return_hidden=return_hidden,
        )

    def head(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Return float32 logits of final-norm hidden states."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.config.tie_embeddings:
            out = vocabulary_dot(rows, params["embed"]["embedding"])
        else:
            kernel = params["head"]["kernel"].astype(rows.dtype)
            out = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
        return out.reshape(*hidden.shape[:-1], -1)

    @nn.compact
    def __call__(
        self,
        tokens: Array | None,
        embeds: Array | None = None,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Mask | None = None,
        caches: CacheStates | None = None,
        update_cache: bool = True,
        logits: Any = "all",
        return_hidden: str = "none",
    ) -> DecoderOutput:
        config, execution = self.config, self.execution
        check_choice("return_hidden", return_hidden, get_args(Hidden))
        shape = _checked_shape(config, tokens, embeds, logits)
        _check_aligned(shape, positions=positions, segment_ids=segment_ids)
        if caches is not None:
            self._check_caches(caches, shape, positions, update_cache)
        head = self._tables()
        x = embeds
        if tokens is not None:
            x = jnp.take(head["embed"]["embedding"], tokens, axis=0)
        assert x is not None  # `forward` checks that exactly one is given
        x = _split_by_sequence(x.astype(execution.dtype))
        in_order = positions is None
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        # The barrier keeps XLA from making them again for every head of every layer.
        angles = rope.angles(config.rope, config.head_dim, positions)
        cos, sin = jax.lax.optimization_barrier(angles)
        context = Context(positions, segment_ids, cos, sin)
        mask = mask or Mask(kind=config.mask, block_size=config.block_size)
        x, states, inputs = self._layers(
            x, context, mask, caches, update_cache, return_hidden == "all", in_order
        )
        x = RMSNorm(config.norm_eps, execution.param_dtype, name="final_norm")(x)
        if caches is not None:
            caches = CacheStates(states, caches.policies)
        hidden = x if return_hidden == "last" else None
        if inputs is not None:
            hidden = jnp.concatenate([inputs, x[None]])
        return DecoderOutput(self._logits(head, x, logits), hidden, caches)

    def _check_caches(self, caches, shape, positions, update_cache) -> None:
        """Raise ValueError if the caches are of other sequences or cannot take the new tokens."""
        batch, count = shape
        held = jax.eval_shape(lambda caches: caches.length, caches).shape[0]
        if held != batch:
            raise ValueError(
                f"{batch} sequences were given and the caches hold {held}; create them with "
                f"init_caches(..., batch={batch}) or choose rows with sqzjax.kvcache.reorder"
            )
        if update_cache:
            known = np.arange(count)[None] if positions is None else positions
            check_new(caches, self.config.layer_windows, count, known)

    def _tables(self) -> Params:
        """Create or read the embedding and, untied, the head kernel."""
        config, dtype = self.config, jnp.dtype(self.execution.param_dtype)
        shape = (config.embedding_size, config.hidden_size)
        # Tied rows also serve as the head, whose logits should start near zero.
        deviation = config.hidden_size**-0.5 if config.tie_embeddings else 1.0
        init = nn.initializers.normal(deviation)
        tables = {"embed": {"embedding": Table(shape, init, dtype, "embedding", name="embed")()}}
        if not config.tie_embeddings:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            tables["head"] = {
                "kernel": Table((shape[1], shape[0]), init, dtype, "kernel", name="head")()
            }
        return tables

    def _logits(self, tables: Params, x: Array, rows: Any) -> Array | None:
        if isinstance(rows, str):
            return self.head(tables, x) if rows == "all" else None
        return self.head(tables, jnp.take_along_axis(x, rows[:, None, None], axis=1))

    def _layers(self, x, context, mask, caches, update_cache, keep_inputs, in_order):
        """Return the residual stream, the new states and, if asked, each layer's input."""
        if self.execution.scan_layers:
            return self._scanned(x, context, mask, caches, update_cache, keep_inputs, in_order)
        states, inputs = [], []
        carry = None if caches is None else caches.first_carry()
        windows = self.config.layer_windows
        for index, window in enumerate(windows):
            policy = None if caches is None else caches.policies[index]
            state = None if caches is None else caches.states[index]
            block = self._block_class(scanned=False)(
                self.config,
                self.execution,
                mask,
                window,
                policy,
                update_cache,
                keep_inputs,
                in_order,
                name=f"layers_{index}",
            )
            (x, carry), (state, kept) = block((x, carry), LayerInput(state), context)
            states.append(state)
            inputs.append(kept)
        return x, tuple(states), jnp.stack(inputs) if keep_inputs else None

    def _scanned(self, x, context, mask, caches, update_cache, keep_inputs, in_order):
        windows = self.config.layer_windows
        carry = None if caches is None else caches.first_carry()
        mixed = len(set(windows)) > 1
        limits = np.array([np.iinfo(np.int32).max if w is None else w for w in windows], np.int32)
        layer = LayerInput(
            state=None if caches is None else caches.states,
            window=jnp.asarray(limits) if mixed else None,
        )
        scan = nn.scan(
            self._block_class(scanned=True),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # type: ignore[arg-type]
            length=self.config.num_layers,
        )
        block = scan(
            self.config,
            self.execution,
            mask,
            None if mixed else windows[0],
            None if caches is None else caches.policies[0],
            update_cache,
            keep_inputs,
            in_order,
            name="layers",
        )
        (x, _), (states, inputs) = block((x, carry), layer, context)
        return x, states, inputs

    def _block_class(self, scanned: bool) -> Any:
        if self.execution.remat == "none":
            return Block
        policy = _REMAT_POLICIES[self.execution.remat]
        # Outside a scan the compiler would share what is to be recomputed, and save nothing.
        return nn.remat(Block, policy=policy, prevent_cse=not scanned)


def _checked_shape(config: ModelConfig, tokens: Any, embeds: Any, rows: Any) -> tuple[int, int]:
    """Return batch and length of the inputs; ValueError if they or `logits` are misshapen."""
    name, given, rule = "tokens", tokens, "[batch, length]"
    if tokens is None:
        name, given, rule = "embeds", embeds, f"[batch, length, {config.hidden_size}]"
    shape = np.shape(given)
    if len(shape) != rule.count(",") + 1 or (tokens is None and shape[2] != config.hidden_size):
        raise ValueError(f"{name} are of shape {list(shape)} and must be {rule}")
    chosen = isinstance(rows, str)
    if rows not in get_args(Rows) if chosen else np.shape(rows) != shape[:1]:
        found = repr(rows) if chosen else f"an array of shape {list(np.shape(rows))}"
        raise ValueError(
            f"logits={found} must be 'all', 'none' or an array of {shape[0]} row indices, one for "
            "each sequence"
        )
    return shape[:2]


def _check_aligned(shape: tuple[int, int], **arrays: Array | None) -> None:
    """Raise ValueError unless what belongs to the tokens has their shape."""
    for name, array in arrays.items():
        if array is not None and np.shape(array) != shape:
            raise ValueError(
                f"{name} are of shape {list(np.shape(array))} and must be {list(shape)}, one for "
                "each token of each sequence; see jax.numpy.broadcast_to"
            )


def _split_by_sequence(x: Array) -> Array:
    """Pin activations to the batch axes of the mesh.

    Left free, the partitioner splits the residual stream like the parameters, by hidden size, and
    repeats the batch on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in AXES[:2] if axis in mesh.auto_axes)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if ways == 1 or x.shape[0] % ways:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


class Table(nn.Module):
    """One named parameter, so that the embedding and the head have paths of their own."""

    shape: tuple[int, int]
    init_fn: Any
    dtype: Any
    leaf: str

    @nn.compact
    def __call__(self) -> Array:
        return self.param(self.leaf, self.init_fn, self.shape, self.dtype)
