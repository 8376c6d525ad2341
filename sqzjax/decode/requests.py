# SPDX-License-Identifier: Apache-2.0
"""Check generation requests on the host and pad them into arrays of few different shapes.

Nothing here touches a device: a bad request raises `RequestError`, naming position and value,
before anything is compiled, and leaves nothing behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pallas_kernels.common import current_target
from sqzjax.decode.base import Requests
from sqzjax.decode.embeds import EMBEDDED, are_embeds, check_embeds
from sqzjax.decode.sampling import sampler
from sqzjax.decode.sampling_config import SamplingConfig, is_integer
from sqzjax.errors import RequestError
from sqzjax.models import ModelConfig

_SMALLEST_PROMPT = 16
_SMALLEST_BUFFER = 32
_SMALLEST_STOPS = 4

Truncate = Literal["left"] | None


@dataclass(frozen=True)
class Limits:
    """What bounds a request: the model's positions, the decoder and, if fixed, the caches."""

    max_positions: int
    capacity: int | None
    prefill_chunk: int
    batch_size: int | None = None
    embeds_dtype: str | None = "float32"  # of prompts that are embeddings; None refuses them
    unsupported: tuple[str, ...] = ()  # sampling settings that the decoder would ignore

    @property
    def tokens(self) -> int:
        """Most tokens, prompt and output together, that a row may have."""
        return min(self.max_positions, self.capacity or self.max_positions)

    @property
    def rule(self) -> str:
        """Name the binding limit."""
        if self.capacity is not None and self.capacity < self.max_positions:
            return f"the cache capacity of {self.capacity}"
        return f"the model's max_positions of {self.max_positions}"


@dataclass(frozen=True)
class Checked:
    """Requests that passed, one config and one row id per prompt.

    Prompts are int32 ids `[T]` or embeddings `[T, D]`.
    """

    prompts: tuple[np.ndarray, ...]
    configs: tuple[SamplingConfig, ...]
    row_ids: tuple[int, ...]


def check(
    prompts: Any,
    sampling: Any,
    model: ModelConfig,
    limits: Limits,
    *,
    tokenizer: Any = None,
    row_ids: Sequence[int] | None = None,
    truncate: Truncate = None,
) -> Checked:
    """Return the requests with every value checked, or raise RequestError."""
    if truncate not in (None, "left"):
        raise RequestError(f"truncate={truncate!r} must be null or 'left'")
    check_tokenizer(tokenizer)
    prompts = _sequence_of_prompts(prompts)
    if limits.batch_size is not None and len(prompts) > limits.batch_size:
        raise RequestError(
            f"{len(prompts)} prompts exceed batch_size={limits.batch_size}; split the request"
        )
    configs = _one_config_each(sampling, len(prompts))
    for index, config in enumerate(configs):
        _check_config(index, config, model, tokenizer)
        _check_supported(index, config, limits)
    encoded = [_encode(i, p, model, limits, tokenizer) for i, p in enumerate(prompts)]
    fitted = [_fit(i, p, c, limits, truncate) for i, (p, c) in enumerate(zip(encoded, configs))]
    ids = _check_row_ids(row_ids, len(prompts))
    return Checked(tuple(fitted), configs, ids)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise RequestError unless `tokenizer` is None or can decode."""
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        raise RequestError(
            f"tokenizer={tokenizer!r:.80} has no method decode(); give an object of "
            "sqzjax.io.tokenizer.load(...), or None"
        )


def pad(checked: Checked, model: ModelConfig, limits: Limits) -> Requests:
    """Pad checked requests into bucketed arrays; samples of one prompt are neighbouring rows."""
    lengths = [len(prompt) for prompt in checked.prompts]
    filling = (limits.batch_size or len(lengths)) - len(lengths)
    width = prompt_bucket(max(lengths), limits.prefill_chunk)
    tokens, embeds = _pad_prompts(checked.prompts, len(lengths) + filling, width)
    counts = [config.num_return_sequences for config in checked.configs] + [1] * filling
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    configs = [c for c, count in zip(checked.configs, counts) for _ in range(count)]
    streams = [(r, s) for r, count in zip(checked.row_ids, counts) for s in range(count)]
    configs += [SamplingConfig(max_new_tokens=0)] * filling
    streams += [(0, 0)] * filling
    most = max(config.max_new_tokens for config in checked.configs)
    longest = max(n + c.max_new_tokens for n, c in zip(lengths, checked.configs))
    return Requests(
        tokens=tokens,
        lengths=np.array(lengths + [0] * filling, np.int32),
        rows=None if len(rows) == len(tokens) else rows,
        limits=np.array([config.max_new_tokens for config in configs], np.int32),
        stop_ids=_stop_ids(configs, model),
        sampler=sampler(configs, streams),
        buffer=power_of_two(most, _SMALLEST_BUFFER),
        capacity=limits.capacity or capacity_bucket(longest),
        embeds=embeds,
    )


def _pad_prompts(
    prompts: Sequence[np.ndarray], rows: int, width: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return ids `[rows, width]`, and embeddings `[rows, width, D]` if any prompt has them."""
    tokens = np.zeros((rows, width), np.int32)
    given = {row: prompt for row, prompt in enumerate(prompts) if prompt.ndim == 2}
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = EMBEDDED if row in given else prompt
    if not given:
        return tokens, None
    first = next(iter(given.values()))
    embeds = np.zeros((rows, width, first.shape[1]), first.dtype)
    for row, prompt in given.items():
        embeds[row, : len(prompt)] = prompt
    return tokens, embeds


def power_of_two(value: int, smallest: int) -> int:
    """Return the lowest power of two >= value and >= smallest."""
    return max(smallest, 1 << max(value - 1, 0).bit_length())


def prompt_bucket(length: int, chunk: int) -> int:
    """Return the padded prompt length: a power of two, above `chunk` that many chunks."""
    if length <= chunk:
        return min(power_of_two(length, _SMALLEST_PROMPT), chunk)
    return chunk * power_of_two(-(-length // chunk), 1)


def capacity_bucket(length: int) -> int:
    """Return the next cache size: 16 steps per octave, at least 32 apart (128 on accelerators).

    On CPU every step reads the whole buffer of a short context, so slack costs time; every size
    is a program to compile, so there must not be many. A TPU copies caches of other multiples.
    """
    step = max(power_of_two(length, 1) // 16, 32 if current_target().platform == "cpu" else 128)
    return -(-length // step) * step


def _sequence_of_prompts(prompts: Any) -> list:
    if isinstance(prompts, np.ndarray) and prompts.ndim in (2, 3):
        return list(prompts)
    if not isinstance(prompts, list | tuple):
        kind = type(prompts).__name__
        raise RequestError(f"prompts must be a list of prompts, not {kind}; wrap one prompt in []")
    if not prompts:
        raise RequestError("prompts is empty; give at least one prompt")
    return list(prompts)


def _one_config_each(sampling: Any, count: int) -> tuple[SamplingConfig, ...]:
    if isinstance(sampling, SamplingConfig):
        return (sampling,) * count
    configs = tuple(sampling) if isinstance(sampling, list | tuple) else (sampling,)
    for index, config in enumerate(configs):
        if not isinstance(config, SamplingConfig):
            raise RequestError(f"sampling {index} is {config!r:.80}; it must be a SamplingConfig")
    if len(configs) != count:
        raise RequestError(f"{len(configs)} sampling configs for {count} prompts; give one or all")
    return configs


def _check_supported(index: int, config: SamplingConfig, limits: Limits) -> None:
    plain = SamplingConfig()
    for name in limits.unsupported:
        value, default = getattr(config, name), getattr(plain, name)
        if value != default:
            raise RequestError(
                f"sampling {index}: {name}={value!r} has no effect with this decoder; leave it at "
                f"{default!r}"
            )


def _check_config(index: int, config: SamplingConfig, model: ModelConfig, tokenizer: Any) -> None:
    ids = {"eos_token_id or stop_token_ids": config.stop_ids(model.tokens.eos)}
    ids["pad_token_id"] = () if config.pad_token_id is None else (config.pad_token_id,)
    for name, values in ids.items():
        for value in values:
            if value >= model.embedding_size:
                raise RequestError(
                    f"sampling {index}: {name} has {value}, which must lie in "
                    f"[0, {model.embedding_size}), the vocabulary"
                )
    if config.stop_strings and tokenizer is None:
        raise RequestError(
            f"sampling {index}: stop_strings={config.stop_strings!r:.80} need a tokenizer; pass "
            "tokenizer=..., or use stop_token_ids"
        )


def _encode(
    index: int, prompt: Any, model: ModelConfig, limits: Limits, tokenizer: Any
) -> np.ndarray:
    if are_embeds(prompt):
        if limits.embeds_dtype is None:
            raise RequestError(
                f"prompt {index} is embeddings, which this decoder does not read; give token ids"
            )
        return check_embeds(index, prompt, model.hidden_size, limits.embeds_dtype)
    if isinstance(prompt, str):
        if not callable(getattr(tokenizer, "encode", None)):
            raise RequestError(
                f"prompt {index} is text, which needs a tokenizer; pass tokenizer=..., or token ids"
            )
        try:
            prompt = tokenizer.encode(prompt, add_bos=None)
        except ValueError as error:
            raise RequestError(f"prompt {index}: {error}") from error
    array = _integers(index, prompt, model.hidden_size)
    if not array.size:
        raise RequestError(f"prompt {index} is empty; give at least one token (the model's bos id)")
    vocabulary = model.vocab_size
    bad = np.flatnonzero((array < 0) | (array >= vocabulary))
    if bad.size:
        raise RequestError(
            f"prompt {index}: token id {array[bad[0]]} at position {bad[0]} must lie in "
            f"[0, {vocabulary}), the vocabulary; check that the tokenizer belongs to the model"
        )
    return array.astype(np.int32)


def _integers(index: int, prompt: Any, width: int) -> np.ndarray:
    """Return the prompt as a vector; lists are looked through, since numpy would cast True to 1."""
    if isinstance(prompt, list | tuple):
        for position, token in enumerate(prompt):
            if not is_integer(token) or not -(2**63) <= token < 2**63:
                raise RequestError(
                    f"prompt {index}: {token!r:.60} at position {position} is not a token id; ids "
                    "are integers"
                )
        return np.array(prompt, np.int64)
    array = np.asarray(prompt)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError(
            f"prompt {index} must be a flat sequence of integer token ids, or a float array "
            f"[T, {width}] of embeddings, not {prompt!r:.60} "
            f"({type(prompt).__name__}, dtype {array.dtype}, {array.ndim} dimensions); wrap a "
            "single prompt in []"
        )
    return array


def _fit(
    index: int,
    prompt: np.ndarray,
    config: SamplingConfig,
    limits: Limits,
    truncate: Truncate,
) -> np.ndarray:
    room = limits.tokens - config.max_new_tokens
    if len(prompt) <= room:
        return prompt
    if truncate == "left" and room > 0:
        return prompt[len(prompt) - room :]
    remedy = "lower max_new_tokens"
    if room > 0:
        remedy = f"shorten the prompt to {room}, {remedy} or pass truncate='left'"
    raise RequestError(
        f"prompt {index} has {len(prompt)} tokens and max_new_tokens={config.max_new_tokens}, "
        f"together {len(prompt) + config.max_new_tokens}; {limits.rule} is exceeded; {remedy}"
    )


def _check_row_ids(row_ids: Any, count: int) -> tuple[int, ...]:
    if row_ids is None:
        return tuple(range(count))
    ids = tuple(row_ids)
    if len(ids) != count:
        raise RequestError(f"{len(ids)} row_ids for {count} prompts; give one per prompt")
    for value in ids:
        if not is_integer(value) or not 0 <= value < 2**32:
            raise RequestError(f"row_ids has {value!r}; ids are integers in [0, 2**32)")
    return ids


def _stop_ids(configs: Sequence[SamplingConfig], model: ModelConfig) -> np.ndarray:
    each = [config.stop_ids(model.tokens.eos) for config in configs]
    width = power_of_two(max(map(len, each)), _SMALLEST_STOPS)
    table = np.full((len(each), width), -1, np.int32)
    for row, ids in enumerate(each):
        table[row, : len(ids)] = ids
    return table
