# SPDX-License-Identifier: Apache-2.0
"""The decoder seam: a frozen policy, a pytree state, and the one driver that runs any of them.

A step may emit any number of tokens per row, each row at its own pointer, so autoregressive,
speculative and block-diffusion decoders share buffers, stopping rules and driver. The driver is a
single jitted loop with a step budget: a large budget decodes to the end without touching the
host, a small one streams, and both run the same compiled program.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.decode.sampling import Sampler
from sqzjax.typing import Array, Bool, Float, Int, Leaf, PyTree

S = TypeVar("S")

RUNNING, STOP, LENGTH = 0, 1, 2
FINISH_REASONS = ("running", "stop", "length")
"""Names of the codes in `Output.reason`."""
ALL_STEPS = 2**31 - 1
"""Step budget that never ends a run early."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "lengths", "reason", "limits", "stop_ids", "logprobs"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Output:
    """What every row has emitted so far, and what will end it.

    Invariant: lengths <= limits <= capacity of the buffer; a row whose reason is not RUNNING never
    changes again. Tokens at or beyond a row's length are 0.
    """

    tokens: Leaf  # B T int32, T the buffer's capacity
    lengths: Leaf  # B int32: tokens emitted
    reason: Leaf  # B int32: RUNNING, STOP or LENGTH
    limits: Leaf  # B int32: most tokens this row may emit (max_new_tokens)
    stop_ids: Leaf  # B E int32: ids that end the row once emitted, padded with -1
    logprobs: Leaf  # B T float32, or None where nobody asked

    @property
    def done(self) -> Bool[Array, "B"]:
        """Rows that have ended."""
        return self.reason != RUNNING


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "lengths", "rows", "limits", "stop_ids", "sampler", "embeds"],
    meta_fields=["buffer", "capacity"],
)
@dataclass(frozen=True)
class Requests:
    """A checked, padded batch of requests: P prompts continued by B >= P rows.

    Prompts that are embeddings have them in `embeds` and EMBEDDED for all their `tokens`; the rows
    of `embeds` of other prompts are zeros, and it is None where every prompt is ids.
    """

    tokens: Leaf  # P T int32: prompts, right-padded
    lengths: Leaf  # P int32: 0 in rows that only fill up the batch
    rows: Leaf  # B int32: prompt of each row, or None where row i continues prompt i
    limits: Leaf  # B int32: max_new_tokens, 0 in filling rows
    stop_ids: Leaf  # B E int32
    sampler: Sampler
    buffer: int  # tokens per row that the output buffer takes
    capacity: int  # tokens per row that the caches must take
    embeds: Leaf = None  # P T D in the compute dtype, or None

    def empty_output(self) -> Output:
        """Return the output buffers before the first token."""
        shape = (self.limits.shape[0], self.buffer)
        logprobs = jnp.zeros(shape, jnp.float32) if self.sampler.mode.logprobs else None
        return Output(
            tokens=jnp.zeros(shape, jnp.int32),
            lengths=jnp.zeros(shape[0], jnp.int32),
            reason=jnp.where(self.limits > 0, RUNNING, LENGTH).astype(jnp.int32),
            limits=self.limits,
            stop_ids=self.stop_ids,
            logprobs=logprobs,
        )


def emit(
    output: Output,
    tokens: Int[Array, "B k"],
    count: Int[Array, "B"],
    logprobs: Float[Array, "B k"] | None = None,
) -> Output:
    """Append the first `count` tokens of each row, up to its first stop id and its limit.

    Rows that are done take nothing. The stop id itself is kept.
    """
    width = tokens.shape[1]
    stops = jnp.any(tokens[:, :, None] == output.stop_ids[:, None, :], axis=-1)
    first_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1), width)
    count = jnp.minimum(count, output.limits - output.lengths)
    count = jnp.where(output.done, 0, count)
    stopped = first_stop < count
    count = jnp.where(stopped, first_stop + 1, count)
    # A select over the whole buffer is one fused pass; XLA's scatter on CPU is a loop over rows.
    offset = jnp.arange(output.tokens.shape[1]) - output.lengths[:, None]
    written = (offset >= 0) & (offset < count[:, None])

    def place(buffer, new):
        if width > 1:
            new = jnp.take_along_axis(new, jnp.clip(offset, 0, width - 1), axis=1)
        return jnp.where(written, new.astype(buffer.dtype), buffer)

    lengths = output.lengths + count.astype(jnp.int32)
    reason = jnp.where(lengths >= output.limits, LENGTH, RUNNING)
    reason = jnp.where(stopped, STOP, reason)
    kept = None if output.logprobs is None else output.logprobs
    if kept is not None and logprobs is not None:
        kept = place(kept, logprobs)
    return replace(
        output,
        tokens=place(output.tokens, tokens),
        lengths=lengths,
        reason=jnp.where(output.done, output.reason, reason).astype(jnp.int32),
        logprobs=kept,
    )


class Decoder(ABC, Generic[S]):
    """A decoding method: a frozen, hashable dataclass with pure, jittable methods.

    `params` is whatever the method runs: one model's parameters, or a dict of several. The state is
    a pytree dataclass that has a field `output: Output` and is donated from step to step, so no
    array of it may also be held elsewhere.
    """

    @property
    def embeds_dtype(self) -> str | None:
        """Name of the dtype that `requests.embeds` should have; None refuses such prompts."""
        return None

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Names of the `SamplingConfig` fields that this method has no meaning for."""
        return ()

    @abstractmethod
    def init(self, params: PyTree, requests: Requests) -> S:
        """Read the prompts; the returned state may hold the first tokens already."""

    @abstractmethod
    def step(self, params: PyTree, state: S) -> S:
        """Advance every unfinished row by zero or more tokens; at least one row by one."""

    def finished(self, state: Any) -> Bool[Array, ""]:
        """Whether every row is done."""
        return jnp.all(state.output.done)

    def stats(self, state: S) -> dict[str, int | float]:
        """Return, on the host, what the method wants reported (bytes, acceptance, ...)."""
        return {}


@partial(jax.jit, static_argnums=0)
def start(decoder: Decoder[S], params: PyTree, requests: Requests) -> S:
    """Run `decoder.init` as one program per prompt bucket."""
    return decoder.init(params, requests)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    decoder: Decoder[S], params: PyTree, state: S, budget: int | Int[Array, ""]
) -> tuple[S, Int[Array, ""]]:
    """Run at most `budget` steps, fewer if all rows finish; return the steps that were run.

    The state is donated: the caller's copy is dead afterwards.
    """

    def unfinished(carry):
        return (carry[0] < budget) & ~decoder.finished(carry[1])

    def body(carry):
        return carry[0] + 1, decoder.step(params, carry[1])

    steps, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))
    return state, steps


@partial(jax.jit, donate_argnums=0)
def end_rows(output: Output, rows: Bool[Array, "B"]) -> Output:
    """Mark rows as stopped from the host (a stop string was found, a client left)."""
    ended = jnp.where(rows & ~output.done, STOP, output.reason)
    return replace(output, reason=ended.astype(jnp.int32))


class Run:
    """One batch being decoded, as the host sees it: the only holder of the (donated) state."""

    def __init__(self, decoder: Decoder, params: PyTree, requests: Requests):
        self.decoder, self.params = decoder, params
        self.state = start(decoder, params, requests)
        self.steps = 0

    def advance(self, budget: int = ALL_STEPS) -> None:
        """Run at most `budget` steps; asking for the result waits for them."""
        self.state, steps = advance(self.decoder, self.params, self.state, budget)
        self.steps += int(steps)

    def end_rows(self, rows: Sequence[bool] | np.ndarray) -> None:
        """Stop the marked rows."""
        output = end_rows(self.state.output, jnp.asarray(rows, bool))
        self.state = replace(self.state, output=output)

    def read(self) -> Output:
        """Copy the output to the host as numpy arrays."""
        return jax.device_get(self.state.output)

    def stats(self) -> dict[str, int | float]:
        """Return the decoder's own statistics."""
        return self.decoder.stats(self.state)
