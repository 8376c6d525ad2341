# SPDX-License-Identifier: Apache-2.0
"""Generate text: one call (`generate`), a stream (`stream_generate`), or a reusable `Generator`.

`Generator` holds prepared parameters and fixed shapes for repeated calls; programs are compiled
once per (prompt bucket, output bucket, batch) and kept by jit. Temperatures, filters, seeds, stop
ids, lengths and limits are arrays and never compile anything.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sqzjax.decode import requests
from sqzjax.decode.autoregressive import Autoregressive
from sqzjax.decode.base import ALL_STEPS, FINISH_REASONS, RUNNING, STOP, Decoder, Run
from sqzjax.decode.outputs import GenerateOutput, GenerateStats, RowUpdate
from sqzjax.decode.prepare import prepare
from sqzjax.decode.sampling_config import SamplingConfig
from sqzjax.decode.text import RowText
from sqzjax.errors import RequestError
from sqzjax.kvcache import Dense, KVCache
from sqzjax.models import DecoderLM, fit_cache
from sqzjax.typing import PyTree

_BURST = 8
"""Steps between looks for a stop string; up to one fewer are computed in vain."""

Prompts = Sequence[Any] | np.ndarray
"""Per prompt token ids, a text, or embeddings: a float array `[T, D]`, D the model's hidden size.

An integer array `[P, T]` or a float array `[P, T, D]` holds prompts of equal length.
"""
Callback = Callable[[tuple[RowUpdate, ...]], Any]


class Generator:
    """Answers requests with one model.

    `capacity` fixes the cache size in tokens per row (prompt and output) and `batch_size` the
    number of prompts (fewer are padded), so that calls share programs; None sizes them per call,
    rounded up. `tokenizer` is any object with `decode(ids, skip_special)`, and `encode` for text
    prompts. A `decoder` of one's own takes `params` as they are, and has its own cache.
    """

    def __init__(
        self,
        model: DecoderLM,
        params: PyTree,
        *,
        cache: KVCache | None = None,
        tokenizer: Any = None,
        capacity: int | None = None,
        batch_size: int | None = None,
        prefill_chunk: int = 512,
        decoder: Decoder | None = None,
    ):
        for name, value in (("capacity", capacity), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise RequestError(f"{name}={value} must be >= 1, or null to fit each call")
        if prefill_chunk < 1:
            raise RequestError(f"prefill_chunk={prefill_chunk} must be >= 1")
        requests.check_tokenizer(tokenizer)
        self.config, self.tokenizer = model.config, tokenizer
        # The decoder's own cache may be named again: a caller that builds both has it at hand.
        if decoder and cache is not None and cache != getattr(decoder, "cache", None):
            raise RequestError(
                f"cache={cache!r:.80} beside a decoder would be ignored; set it in the decoder"
            )
        if decoder is None:
            cache = Dense() if cache is None else cache
            model, params = prepare(model, params)
            params = fit_cache(model, params, cache)
            decoder = Autoregressive(model=model, cache=cache, prefill_chunk=prefill_chunk)
        self.decoder, self.params = decoder, params
        self.limits = requests.Limits(
            self.config.max_positions,
            capacity,
            prefill_chunk,
            batch_size,
            decoder.embeds_dtype,
            decoder.unsupported,
        )

    def generate(
        self,
        prompts: Prompts,
        sampling: SamplingConfig | Sequence[SamplingConfig] = SamplingConfig(),
        *,
        stream: Callback | None = None,
        steps_per_sync: int | None = None,
        truncate: requests.Truncate = None,
        row_ids: Sequence[int] | None = None,
    ) -> GenerateOutput:
        """Continue every prompt until it stops: token ids, text given a tokenizer, or embeddings.

        A prompt that is a float array `[T, D]` goes in as it is, in place of rows of
        `params["embed"]["embedding"]`; to mix ids in, look theirs up there and concatenate. A
        batch may hold prompts of all kinds. Embeddings have no ids: a repetition penalty does not
        count them, and text is decoded as if nothing came before it.

        `sampling`: one for all prompts or one each. `stream` is called with the updates of every
        `steps_per_sync` steps (1 by default). A prompt that does not fit beside its
        max_new_tokens is rejected, or with `truncate="left"` loses its oldest tokens. `row_ids`
        select the random numbers of the prompts (default: their index).
        """
        began = time.perf_counter()
        checked = self._check(prompts, sampling, truncate, row_ids)
        stops = any(config.stop_strings for config in checked.configs)
        budget = _check_budget(steps_per_sync, 1 if stream else _BURST if stops else ALL_STEPS)
        session = _Session(self, checked, began)
        while True:
            updates = session.sync()
            if stream and updates:
                stream(updates)
            if session.finished:
                return session.result()
            session.advance(budget)

    def stream(
        self,
        prompts: Prompts,
        sampling: SamplingConfig | Sequence[SamplingConfig] = SamplingConfig(),
        *,
        steps_per_sync: int | None = None,
        truncate: requests.Truncate = None,
        row_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[RowUpdate, ...]]:
        """Return an iterator over the updates of every `steps_per_sync` steps (1 by default).

        The request is checked at the call, not at the first `next`. The iterator's return value
        (`StopIteration.value`) is the `GenerateOutput`.
        """
        began = time.perf_counter()
        checked = self._check(prompts, sampling, truncate, row_ids)
        return self._updates(checked, _check_budget(steps_per_sync, 1), began)

    def _updates(self, checked: requests.Checked, budget: int, began: float):
        session = _Session(self, checked, began)
        while True:
            updates = session.sync()
            if updates:
                yield updates
            if session.finished:
                return session.result()
            session.advance(budget)

    def _check(self, prompts, sampling, truncate, row_ids) -> requests.Checked:
        return requests.check(
            prompts,
            sampling,
            self.config,
            self.limits,
            tokenizer=self.tokenizer,
            row_ids=row_ids,
            truncate=truncate,
        )


def generate(
    model: DecoderLM,
    params: PyTree,
    prompts: Prompts,
    sampling: SamplingConfig | Sequence[SamplingConfig] = SamplingConfig(),
    *,
    cache: KVCache = Dense(),
    tokenizer: Any = None,
    capacity: int | None = None,
    prefill_chunk: int = 512,
    **options: Any,
) -> GenerateOutput:
    """Continue prompts with a model; see `Generator`, and `Generator.generate` for `options`.

    Parameters are prepared anew at every call: keep a `Generator` to call more than once.
    """
    generator = Generator(
        model,
        params,
        cache=cache,
        tokenizer=tokenizer,
        capacity=capacity,
        prefill_chunk=prefill_chunk,
    )
    return generator.generate(prompts, sampling, **options)


def stream_generate(
    model: DecoderLM,
    params: PyTree,
    prompts: Prompts,
    sampling: SamplingConfig | Sequence[SamplingConfig] = SamplingConfig(),
    *,
    cache: KVCache = Dense(),
    tokenizer: Any = None,
    capacity: int | None = None,
    prefill_chunk: int = 512,
    **options: Any,
) -> Iterator[tuple[RowUpdate, ...]]:
    """Iterate over new tokens and text as they appear; see `Generator.stream` for `options`."""
    generator = Generator(
        model,
        params,
        cache=cache,
        tokenizer=tokenizer,
        capacity=capacity,
        prefill_chunk=prefill_chunk,
    )
    return generator.stream(prompts, sampling, **options)


class _Session:
    """One batch from its prefill to its result, on the host."""

    def __init__(self, generator: Generator, checked: requests.Checked, began: float):
        self._checked = checked
        padded = requests.pad(checked, generator.config, generator.limits)
        counts = [config.num_return_sequences for config in checked.configs]
        self._source = [i for i, count in enumerate(counts) for _ in range(count)]
        self._pad = generator.config.tokens.pad or 0
        self._texts = self._make_texts(generator)
        self._reported = [0] * len(self._source)
        self._ended: list[str | None] = [None] * len(self._source)
        self._pieces: list[list[str]] = [[] for _ in self._source]
        prefill_began = time.perf_counter()
        self._run = Run(generator.decoder, generator.params, padded)
        jax.block_until_ready(self._run.state.output.tokens)
        now = time.perf_counter()
        self._prefill_seconds, self._ttft_seconds = now - prefill_began, now - began
        self._decode_seconds = 0.0

    @property
    def finished(self) -> bool:
        """Whether every row has its finish reason."""
        return all(reason is not None for reason in self._ended)

    def advance(self, budget: int) -> None:
        """Decode up to `budget` steps."""
        began = time.perf_counter()
        self._run.advance(budget)
        self._decode_seconds += time.perf_counter() - began

    def sync(self) -> tuple[RowUpdate, ...]:
        """Fetch new tokens, find stop strings, end their rows on the device; return what is new."""
        self._output = self._run.read()
        updates = [self._update(row) for row in range(len(self._source))]
        reasons = self._output.reason[: len(self._source)]
        stopped = np.zeros(len(self._output.reason), bool)
        stopped[: len(self._source)] = [
            ended is not None and code == RUNNING for ended, code in zip(self._ended, reasons)
        ]
        if stopped.any() and not self.finished:
            self._run.end_rows(stopped)
        return tuple(update for update in updates if update is not None)

    def result(self) -> GenerateOutput:
        """Assemble the output of all rows."""
        lengths = np.array(self._reported, np.int32)
        width = int(lengths.max(initial=0))
        beyond = np.arange(width) >= lengths[:, None]
        pads = [self._checked.configs[i].pad_token_id for i in self._source]
        pads = np.array([self._pad if pad is None else pad for pad in pads], np.int32)
        rows = len(self._source)
        tokens = np.where(beyond, pads[:, None], self._output.tokens[:rows, :width])
        logprobs = self._output.logprobs
        if logprobs is not None:
            logprobs = np.where(beyond, np.float32(0), logprobs[:rows, :width])
        texts = None if self._texts is None else tuple("".join(p) for p in self._pieces)
        return GenerateOutput(
            tokens=tokens,
            lengths=lengths,
            finish_reason=tuple(str(reason) for reason in self._ended),
            text=texts,
            logprobs=logprobs,
            stats=self._stats(int(lengths.sum())),
        )

    def _make_texts(self, generator: Generator) -> list[RowText] | None:
        if generator.tokenizer is None:
            return None
        texts = []
        for source in self._source:
            config = self._checked.configs[source]
            stop_ids = config.stop_ids(generator.config.tokens.eos)
            prompt = self._checked.prompts[source]
            prompt = [] if prompt.ndim == 2 else prompt.tolist()
            texts.append(RowText(generator.tokenizer, prompt, config.stop_strings, stop_ids))
        return texts

    def _update(self, row: int) -> RowUpdate | None:
        """Take the new tokens of a row into account; None if nothing is new."""
        if self._ended[row] is not None:
            return None
        begin, end = self._reported[row], int(self._output.lengths[row])
        code = int(self._output.reason[row])
        reason = None if code == RUNNING else FINISH_REASONS[code]
        text = ""
        if self._texts is not None:
            writer = self._texts[row]
            text = writer.push(self._output.tokens[row, begin:end].tolist())
            text += writer.finish() if reason and not writer.stopped else ""
            if writer.stopped:
                end, reason = writer.length, FINISH_REASONS[STOP]
            self._pieces[row].append(text)
        self._reported[row], self._ended[row] = end, reason
        if begin == end and reason is None:
            return None
        return RowUpdate(row, tuple(self._output.tokens[row, begin:end].tolist()), text, reason)

    def _stats(self, new_tokens: int) -> GenerateStats:
        extra = dict(self._run.stats())
        return GenerateStats(
            prompt_tokens=sum(len(prompt) for prompt in self._checked.prompts),
            new_tokens=new_tokens,
            rows=len(self._source),
            steps=self._run.steps,
            prefill_seconds=self._prefill_seconds,
            ttft_seconds=self._ttft_seconds,
            decode_seconds=self._decode_seconds,
            cache_bytes=int(extra.pop("cache_bytes", 0)),
            extra=extra,
        )


def _check_budget(steps_per_sync: int | None, default: int) -> int:
    value = default if steps_per_sync is None else steps_per_sync
    if value < 1:
        raise RequestError(f"steps_per_sync={value} must be >= 1")
    return value
