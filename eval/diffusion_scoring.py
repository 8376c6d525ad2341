# SPDX-License-Identifier: Apache-2.0
"""Log-likelihood bounds of masked diffusion models, with the interface of `eval.scoring`.

A target of L tokens is masked at l places drawn for l uniform in 1..L; L/l times the summed
log-probability of the masked tokens has a mean that is a lower bound of the log-likelihood (LLaDA,
arXiv 2502.09992). The prompt is never masked. Block-causal models multiply such bounds over blocks,
each given the clean blocks before it (BD3-LM, arXiv 2503.09573): a noisy and a clean copy in one
pass of twice the length. Blocks of one token make it the likelihood itself.

Up to `samples` passes per request. A target or block with so few masks that they fit in is
enumerated instead of sampled (2^L - 1 passes), and its bound then has no sampling error.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from eval.config import Likelihood
from eval.scoring import (
    LikelihoodScorer,
    Request,
    Score,
    joined,
    padded_shape,
    target_scores,
)
from sqzjax.attention import Mask
from sqzjax.errors import RequestError
from sqzjax.models import DecoderLM
from sqzjax.typing import Array, Bool, Float, Int, Params


@dataclass(frozen=True, kw_only=True)
class DiffusionScorer(LikelihoodScorer):
    """Bound the log-likelihood of continuations under a bidirectional or block-causal model.

    `Score.token_logprobs` are the tokens' shares of the bound. `is_greedy` tells whether filling
    the surest position, one pass each, yields the target (blocks in order). Masks depend on the
    seed and the context alone: continuations of one context share them, which makes comparing
    these sharper. `max_length` counts all tokens, the last one too.
    """

    model: DecoderLM
    params: Params = field(repr=False)
    likelihood: Likelihood = Likelihood()
    batch_size: int = 8
    max_length: int = 0
    truncate: Literal["never", "left"] = "never"
    head_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        config = self.model.config
        if config.mask == "causal" or config.tokens.mask is None:
            raise RequestError(
                f"mask={config.mask!r}, mask token {config.tokens.mask}: bounds by masking are for "
                "models with a mask token that are not causal; use Scorer for causal ones"
            )
        if config.mask == "block_causal" and config.shift_logits:
            raise RequestError("block-causal models with shifted logits have no likelihood here")
        most = config.max_positions
        if self.batch_size < 1 or not 0 <= self.max_length <= most or self.max_length == 1:
            raise RequestError(
                f"batch_size={self.batch_size} must be >= 1 and max_length={self.max_length} lie "
                f"in [2, {most}] (0: {most})"
            )

    @property
    def limit(self) -> int:
        """Most tokens before the last one of a target."""
        return (self.max_length or self.model.config.max_positions) - 1

    @property
    def estimate(self) -> dict[str, Any]:
        """How the figures were found."""
        settings = {"samples": self.likelihood.samples, "seed": self.likelihood.seed}
        return {"kind": "bound", **settings}

    def score(
        self, requests: Sequence[Request], *, progress: Callable[[int], None] | None = None
    ) -> list[Score]:
        """Return scores in request order; `progress` is told how many requests are done."""
        rows = [self._prepare(index, request) for index, request in enumerate(requests)]
        shares = [np.zeros(count) for _, count in rows]
        greedy = np.ones(len(rows), bool)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (tokens, count) in enumerate(rows):
            if count:
                shape = padded_shape(len(tokens), count, self.limit + 1)
                groups.setdefault(shape, []).append(index)
        for shape in sorted(groups, reverse=True):
            members = groups[shape]
            self._bound(shape, members, rows, shares)
            for batch in _chunks(members, self.batch_size):
                greedy[batch] = self._greedy(shape, [rows[i] for i in batch])
                if progress is not None:
                    progress(len(batch))
        return [
            Score(float(share.sum()), bool(flag), share.astype(np.float32))
            for share, flag in zip(shares, greedy, strict=True)
        ]

    def _prepare(self, index: int, request: Request) -> tuple[np.ndarray, int]:
        config = self.model.config
        if config.shift_logits and not len(request.context):
            raise RequestError(
                f"request {index} has an empty context: the model predicts a token from the one "
                "before; begin with the BOS token"
            )
        return joined(request, index, config.embedding_size, self.limit, self.truncate)

    def _bound(self, shape, members, rows, shares) -> None:
        """Add the weighted log-probabilities of all masks to the shares of their tokens."""
        jobs = ((index, weights) for index in members for weights in self._weights(*rows[index]))
        pending = None
        for batch in _chunks(jobs, self.batch_size):
            # One batch stays in flight while the next is prepared.
            started = batch, self._start(shape, rows, batch)
            _collect(pending, shares)
            pending = started
        _collect(pending, shares)

    def _weights(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """Return the weight `[passes, count]` of each target in each pass, 0 where it is shown."""
        context = tokens[: len(tokens) - count]
        text = f"{self.likelihood.seed}:".encode() + context.astype("<i4").tobytes()
        key = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), "<u8")
        draw = np.random.Generator(np.random.Philox(key=key))
        return mask_weights(self._blocks(len(context), count), self.likelihood.samples, draw)

    def _blocks(self, begin: int, count: int) -> np.ndarray:
        """Return the number of target tokens in each block that holds some."""
        if self.model.config.mask == "bidirectional":
            return np.array([count])
        place = np.arange(begin, begin + count) // self.model.config.block_size
        return np.bincount(place - place[0])

    def _start(self, shape, rows, jobs) -> Array:
        tokens, positions, where, targets = self._arrays(shape, [rows[i] for i, _ in jobs])
        noisy, mask = tokens.copy(), self.model.config.tokens.mask
        assert mask is not None  # checked when the scorer was made
        for row, (index, weights) in enumerate(jobs):
            ids, count = rows[index]
            noisy[row, len(ids) - count : len(ids)][weights > 0] = mask
        return masked_logprobs(
            self.model, self._head_rows, self.params, (noisy, tokens, positions, where, targets)
        )

    def _greedy(self, shape, rows) -> np.ndarray:
        tokens, positions, where, targets = self._arrays(shape, rows)
        wanted = np.zeros(where.shape, bool)
        for row, (_, count) in enumerate(rows):
            wanted[row, :count] = True
        batch = (tokens, positions, where, targets, wanted)
        found = yields_targets(self.model, self._head_rows, self.params, batch)
        return np.asarray(found)[: len(rows)]

    @property
    def _head_rows(self) -> int:
        return max(1, self.head_bytes // (4 * self.model.config.embedding_size))

    def _arrays(self, shape: tuple[int, int], rows: Sequence[tuple[np.ndarray, int]]):
        """Return tokens and positions `[B, T]`, places and ids of the targets `[B, R]`."""
        size, (length, most) = self.batch_size, shape
        tokens = np.zeros((size, length), np.int32)
        positions = np.full((size, length), -1, np.int32)
        where, targets = np.zeros((size, most), np.int32), np.zeros((size, most), np.int32)
        for row, (ids, count) in enumerate(rows):
            tokens[row, : len(ids)] = ids
            positions[row, : len(ids)] = np.arange(len(ids))
            where[row, :count] = np.arange(len(ids) - count, len(ids))
            targets[row, :count] = ids[len(ids) - count :]
        return tokens, positions, where, targets


def mask_weights(
    blocks: Int[np.ndarray, " n"], samples: int, draw: np.random.Generator
) -> Float[np.ndarray, "passes tokens"]:
    """Return the weight of every token's log-probability in every pass, 0 where it is not masked.

    Each block of so many tokens has the expectation over its own masks. Blocks share the passes:
    a block sees none but clean tokens of others.
    """
    parts = [
        _every_mask(size) if 2**size - 1 <= samples else _some_masks(size, samples, draw)
        for size in blocks.tolist()
    ]
    passes = max(len(part) for part in parts)
    return np.concatenate(
        [np.pad(part, ((0, passes - len(part)), (0, 0))) for part in parts], axis=1
    )


@cache
def _every_mask(size: int) -> np.ndarray:
    """Return the weights `[2^size - 1, size]` of all masks.

    The chance of a mask is 1/size for its count over the number of masks that have it; size/count
    is the weight of its tokens.
    """
    masks = (np.arange(1, 2**size)[:, None] >> np.arange(size)) & 1
    counts = masks.sum(axis=1)
    choices = np.array([math.comb(size, int(count)) for count in counts])
    return masks / (choices * counts)[:, None]


def _some_masks(size: int, samples: int, draw: np.random.Generator) -> np.ndarray:
    """Return weights `[samples, size]` of random masks; their counts are spread evenly."""
    level = (draw.random() + draw.permutation(samples)) / samples
    counts = np.minimum(1 + np.floor(level * size), size)[:, None]
    ranks = draw.random((samples, size)).argsort(axis=1).argsort(axis=1)
    return (ranks < counts) * (size / counts) / samples


def _collect(pending: tuple[Any, Array] | None, shares: list[np.ndarray]) -> None:
    if pending is None:
        return
    jobs, logprobs = pending
    logprobs = np.asarray(logprobs, np.float64)
    for row, (index, weights) in enumerate(jobs):
        # A token that is shown has no weight; its log-probability may be anything.
        used = np.where(weights > 0, logprobs[row, : len(weights)], 0.0)
        shares[index] += weights * used


def _chunks(items: Any, size: int) -> Iterator[list[Any]]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@partial(jax.jit, static_argnums=(0, 1))
def masked_logprobs(
    model: DecoderLM, head_rows: int, params: Params, batch: tuple[Array, ...]
) -> Float[Array, "B R"]:
    """Return log-probabilities of targets `[B, R]` at their places in a noisy text.

    `batch`: noisy and clean tokens `[B, T]`, positions (-1 padding), places and ids of the targets.
    """
    noisy, clean, positions, where, targets = batch
    config, mask = model.config, None
    inputs = noisy, positions
    if config.mask == "block_causal":
        mask = Mask(kind="noisy_clean", block_size=config.block_size)
        inputs = jnp.concatenate([noisy, clean], 1), jnp.concatenate([positions, positions], 1)
    out = model.forward(
        params, inputs[0], positions=inputs[1], mask=mask, logits="none", return_hidden="last"
    )
    assert out.hidden is not None
    where = _predictors(model, where)
    return target_scores(model, head_rows, params, out.hidden, where, targets).logprob


@partial(jax.jit, static_argnums=(0, 1))
def yields_targets(
    model: DecoderLM, head_rows: int, params: Params, batch: tuple[Array, ...]
) -> Bool[Array, "B"]:
    """Tell whether filling the surest position again and again gives exactly the targets.

    `batch`: tokens and positions `[B, T]`, places, ids and validity of the targets `[B, R]`. It
    ends when every row has gone wrong or is full.
    """
    tokens, positions, where, targets, wanted = batch
    config, mask = model.config, model.config.tokens.mask
    assert mask is not None  # the scorer refuses such models
    lines = jnp.arange(tokens.shape[0])[:, None]
    block = where // (config.block_size if config.mask == "block_causal" else tokens.shape[1])

    def step(state):
        masked, right = state
        hidden = jnp.zeros(tokens.shape, bool).at[lines, where].max(masked)
        out = model.forward(
            params,
            jnp.where(hidden, mask, tokens),
            positions=positions,
            logits="none",
            return_hidden="last",
        )
        assert out.hidden is not None
        found = target_scores(
            model, head_rows, params, out.hidden, _predictors(model, where), targets
        )
        now = jnp.min(jnp.where(masked, block, tokens.shape[1]), axis=1, keepdims=True)
        sure = jnp.where(masked & (block == now), found.best, -jnp.inf)
        place = jnp.argmax(sure, axis=1)[:, None]
        right &= jnp.take_along_axis(found.is_best, place, axis=1)[:, 0] | ~masked.any(axis=1)
        masked &= jnp.arange(where.shape[1]) != place
        return masked & right[:, None], right

    def going(state):
        return jnp.any(state[0])

    start = jnp.asarray(wanted), jnp.ones(tokens.shape[0], bool)
    return jax.lax.while_loop(going, step, start)[1]


def _predictors(model: DecoderLM, where: Array) -> Array:
    """Return the positions whose output predicts those of `where`."""
    return jnp.maximum(where - 1, 0) if model.config.shift_logits else where
