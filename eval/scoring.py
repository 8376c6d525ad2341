# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of token continuations: what perplexity, multiple choice and lm-eval rest on.

Requests are sorted by length and padded to a few shapes, so a task compiles a handful of programs.
Only the rows that predict a target meet the head, a chunk at a time: the cost beyond the forward
pass is `head_bytes` of logits, never `[B, T, V]`. With a cache policy the tokens are fed in chunks
through that cache, so that a compressed cache is judged by the same tasks as the exact one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.errors import RequestError
from sqzjax.kvcache import KVCache
from sqzjax.models import DecoderLM
from sqzjax.typing import Array, Float, Int, Params

SMALLEST_LENGTH = 16
TARGET_GROWTH = 8
"""Target counts are padded to powers of this; lengths to powers of two."""


class Request(NamedTuple):
    """Score `target` as the continuation of `context`; both are token ids."""

    context: Sequence[int] | np.ndarray
    target: Sequence[int] | np.ndarray


class Score(NamedTuple):
    """Natural log-likelihood of a target, whether greedy decoding yields it, and its tokens'."""

    logprob: float
    is_greedy: bool
    token_logprobs: np.ndarray


class LikelihoodScorer(ABC):
    """Scores continuations; what perplexity, needles and multiple choice ask for."""

    @property
    @abstractmethod
    def limit(self) -> int:
        """Most tokens in front of the last one of a target."""

    @property
    def estimate(self) -> dict[str, Any] | None:
        """How scores were estimated, None where they are the log-likelihoods themselves."""
        return None

    @abstractmethod
    def score(
        self, requests: Sequence[Request], *, progress: Callable[[int], None] | None = None
    ) -> list[Score]:
        """Return scores in request order; `progress` is told how many requests are done."""


@dataclass(frozen=True, kw_only=True)
class Scorer(LikelihoodScorer):
    """Score continuations with a causal model.

    `max_length` is the most tokens that are fed at once (0: the model's `max_positions`). `cache`
    None runs the plain forward pass; a policy runs `prefill_chunk` tokens at a time through that
    cache. `truncate="left"` drops the oldest context of a request that is too long; the default
    refuses it.
    """

    model: DecoderLM
    params: Params = field(repr=False)
    cache: KVCache | None = None
    batch_size: int = 8
    max_length: int = 0
    prefill_chunk: int = 128
    truncate: Literal["never", "left"] = "never"
    head_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        config = self.model.config
        if config.mask != "causal":
            raise RequestError(
                f"the model's attention is {config.mask}: token-by-token likelihood is defined for "
                "causal models only; use DiffusionScorer"
            )
        if self.batch_size < 1 or self.prefill_chunk < 1 or self.max_length < 0:
            raise RequestError(
                f"batch_size={self.batch_size} and prefill_chunk={self.prefill_chunk} must be >= 1 "
                f"and max_length={self.max_length} >= 0"
            )
        if self.max_length > config.max_positions:
            raise RequestError(
                f"max_length={self.max_length} exceeds the model's max_positions="
                f"{config.max_positions}; use that or less"
            )

    @property
    def limit(self) -> int:
        """Most tokens fed in one row; the last target is not fed."""
        return self.max_length or self.model.config.max_positions

    def score(
        self, requests: Sequence[Request], *, progress: Callable[[int], None] | None = None
    ) -> list[Score]:
        """Return scores in request order; `progress` is told how many requests each batch ended.

        The last target token is not fed. An empty target scores 0 and counts as greedy; an empty
        context is an error, since nothing predicts the first token.
        """
        rows = [self._prepare(index, request) for index, request in enumerate(requests)]
        results: list[Score] = [Score(0.0, True, np.zeros(0, np.float32))] * len(rows)
        pending: tuple[list[int], Any] | None = None
        for batch in self._batches(rows):
            # One batch stays in flight while the next is prepared.
            started = (batch, self._start([rows[i] for i in batch]))
            self._collect(pending, rows, results, progress)
            pending = started
        self._collect(pending, rows, results, progress)
        return results

    def _prepare(self, index: int, request: Request) -> tuple[np.ndarray, int]:
        """Return the tokens of one request and how many of them are targets."""
        if not len(request.context):
            raise RequestError(
                f"request {index} has an empty context: nothing predicts its first token; begin "
                "with the BOS token"
            )
        size = self.model.config.embedding_size
        return joined(request, index, size, self.limit, self.truncate)

    def _batches(self, rows: list[tuple[np.ndarray, int]]) -> list[list[int]]:
        """Group rows of one padded shape, the longest first so that memory runs out at once."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            if row[1]:
                groups.setdefault(self._shape(row), []).append(index)
        batches = []
        for shape in sorted(groups, reverse=True):
            members = groups[shape]
            size = self.batch_size
            batches += [members[i : i + size] for i in range(0, len(members), size)]
        return batches

    def _shape(self, row: tuple[np.ndarray, int]) -> tuple[int, int]:
        return padded_shape(len(row[0]) - 1, row[1], self.limit)

    def _start(self, rows: list[tuple[np.ndarray, int]]) -> tuple[Array, Array]:
        length, count = self._shape(rows[0])
        if self.cache is not None:
            length += -length % min(self.prefill_chunk, length)
        size = self.batch_size
        tokens, positions = (
            np.zeros((size, length), np.int32),
            np.full((size, length), -1, np.int32),
        )
        where, targets = (np.zeros((size, count), np.int32), np.zeros((size, count), np.int32))
        for i, (ids, wanted) in enumerate(rows):
            fed = len(ids) - 1
            tokens[i, :fed] = ids[:-1]
            positions[i, :fed] = np.arange(fed)
            where[i, :wanted] = np.arange(fed - wanted, fed)
            targets[i, :wanted] = ids[fed - wanted + 1 :]
        return score_batch(
            self.model,
            self.cache,
            min(self.prefill_chunk, length),
            max(1, self.head_bytes // (4 * self.model.config.embedding_size)),
            self.params,
            (tokens, positions, where, targets),
        )

    def _collect(self, pending, rows, results, progress) -> None:
        if pending is None:
            return
        batch, (logprobs, greedy) = pending
        logprobs, greedy = np.asarray(logprobs), np.asarray(greedy)
        for i, index in enumerate(batch):
            wanted = rows[index][1]
            tokens = logprobs[i, :wanted].copy()
            total = float(tokens.sum(dtype=np.float64))
            results[index] = Score(total, bool(greedy[i, :wanted].all()), tokens)
        if progress is not None:
            progress(len(batch))


def joined(
    request: Request, index: int, vocab_size: int, limit: int, truncate: str
) -> tuple[np.ndarray, int]:
    """Return the tokens of a request, `limit` + 1 at most, and how many of them are targets."""
    context = check_tokens(request.context, vocab_size, index, "context")
    target = check_tokens(request.target, vocab_size, index, "target")
    tokens = np.concatenate([context, target])
    excess = len(tokens) - 1 - limit
    if excess > 0 and (truncate == "never" or len(target) > limit):
        raise RequestError(
            f"request {index} needs {len(tokens) - 1} tokens but max_length={limit}; "
            'shorten it, or use truncate="left" if its target fits'
        )
    return tokens[max(excess, 0) :], len(target)


def padded_shape(length: int, targets: int, limit: int) -> tuple[int, int]:
    """Return the number of tokens and of targets that a row is padded to."""
    size = SMALLEST_LENGTH
    while size < length:
        size *= 2
    size = min(size, limit)
    count = 1
    while count < targets:
        count *= TARGET_GROWTH
    return size, min(count, size)


def check_tokens(
    ids: Sequence[int] | np.ndarray, vocab_size: int, index: int, name: str
) -> np.ndarray:
    """Return ids as int32, or raise RequestError naming the request, position and id."""
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise RequestError(f"{name} of request {index} is a ragged nested list") from error
    if array.ndim == 1 and array.size == 0:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError(
            f"{name} of request {index} must be one flat sequence of integers, not {ids!r:.60}"
        )
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if bad.size:
        raise RequestError(
            f"{name} of request {index} has token {array[bad[0]]} at position {bad[0]}; ids must "
            f"lie in [0, {vocab_size})"
        )
    return array.astype(np.int32)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def score_batch(
    model: DecoderLM,
    cache: KVCache | None,
    prefill_chunk: int,
    head_rows: int,
    params: Params,
    batch: tuple[Array, Array, Array, Array],
) -> tuple[Array, Array]:
    """Return log-probabilities and greedy flags `[B, R]` of targets.

    `batch`: tokens `[B, T]`, positions `[B, T]` (-1 padding), the rows `[B, R]` that predict the
    targets `[B, R]`.
    """
    tokens, positions, rows, targets = batch
    hidden = _hidden(model, cache, prefill_chunk, params, tokens, positions)
    found = target_scores(model, head_rows, params, hidden, rows, targets)
    return found.logprob, found.is_best


class TargetScores(NamedTuple):
    """Of each target `[B, R]`: its log-probability, whether it is the best id, and the best's."""

    logprob: Array
    is_best: Array
    best: Array


def target_scores(
    model: DecoderLM,
    head_rows: int,
    params: Params,
    hidden: Float[Array, "B T D"],
    rows: Int[Array, "B R"],
    targets: Int[Array, "B R"],
) -> TargetScores:
    """Apply the head to the rows that predict targets, `head_rows` of them at a time."""
    picked = jnp.take_along_axis(hidden, rows[:, :, None], axis=1).reshape(-1, hidden.shape[-1])
    total = rows.size
    size = min(head_rows, total)
    padding = -total % size
    picked = jnp.pad(picked, ((0, padding), (0, 0))).reshape(-1, size, hidden.shape[-1])
    wanted = jnp.pad(targets.reshape(-1), (0, padding)).reshape(-1, size)

    def chunk(inputs: tuple[Array, Array]) -> TargetScores:
        vectors, ids = inputs
        logits = model.head(params, vectors)
        chosen = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
        norm = jax.nn.logsumexp(logits, axis=-1)
        best = jnp.max(logits, axis=-1) - norm
        return TargetScores(chosen - norm, jnp.argmax(logits, axis=-1) == ids, best)

    found = jax.lax.map(chunk, (picked, wanted))
    return jax.tree.map(lambda leaf: leaf.reshape(-1)[:total].reshape(rows.shape), found)


def _hidden(
    model: DecoderLM,
    cache: KVCache | None,
    chunk: int,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Array:
    """Return final-norm hidden states `[B, T, D]`, whole or in chunks through a cache."""
    if cache is None:
        out = model.forward(
            params, tokens, positions=positions, logits="none", return_hidden="last"
        )
        assert out.hidden is not None
        return out.hidden
    batch, length = tokens.shape
    caches = model.init_caches(cache, batch=batch, capacity=length, max_new=chunk)

    def step(caches: Any, inputs: tuple[Array, Array]) -> tuple[Any, Any]:
        ids, where = inputs
        out = model.forward(
            params, ids, positions=where, caches=caches, logits="none", return_hidden="last"
        )
        return out.caches, out.hidden

    pieces = [x.reshape(batch, -1, chunk).swapaxes(0, 1) for x in (tokens, positions)]
    _, hidden = jax.lax.scan(step, caches, (pieces[0], pieces[1]))
    return hidden.swapaxes(0, 1).reshape(batch, length, -1)
