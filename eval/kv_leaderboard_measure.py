# SPDX-License-Identifier: Apache-2.0
"""What one cache does to one model: its bytes, the quality of what it remembers, its speed.

Quality goes through the ordinary tasks, so every lossy read happens as in use: texts and prompts
enter the cache in chunks and each token attends to what the cache made of the chunks before.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from eval import run
from eval.config import EvalConfig, Perplexity, label
from eval.kv_leaderboard_config import CacheSpeed, KvLeaderboardConfig, Responses
from eval.models import LoadedModel
from eval.scoring import Request
from eval.speed_measure import greedy, random_prompts
from eval.tasks import encode
from sqzjax import problems
from sqzjax.analysis.cache_bytes import CacheBytes, cache_bytes
from sqzjax.decode import Generator
from sqzjax.kvcache import Dense, KVCache
from sqzjax.models import fit_cache

_BULKY = ("document_nll", "document_tokens", "baselines", "examples", "cells")
Metrics = dict[str, Any]


def with_cache(base: LoadedModel, name: str, policy: KVCache, key: str) -> LoadedModel:
    """Return a loaded model that reads through a cache; `key` tells its saved samples apart.

    Raise ValueError where the method needs a calibration that is missing or of another model.
    """
    return replace(
        base,
        name=name,
        cache=policy,
        params=fit_cache(base.model, base.params, policy),
        fingerprint=key,
    )


def as_evaluation(config: KvLeaderboardConfig) -> EvalConfig:
    """Return the settings under which the ordinary tasks of a row run."""
    return EvalConfig(
        models=(config.model,),
        tasks=tuple(task for task in config.tasks if not isinstance(task, Responses)),
        seed=config.seed,
        batch_size=config.batch_size,
        max_length=config.context,
        prefill_chunk=config.prefill_chunk,
    )


def stages(
    config: KvLeaderboardConfig, model: LoadedModel, workdir: Path
) -> list[tuple[str, str, Callable[[], Metrics]]]:
    """Return what is measured of a cache: a section of its row, a name in it, and the work."""
    found: list[tuple[str, str, Callable[[], Metrics]]]
    found = [("bytes", "", lambda: sizes(model, config.prefill_chunk))]
    context = run.Context(config=as_evaluation(config), workdir=workdir)
    for task in config.tasks:
        section = "retrieval"
        if isinstance(task, Perplexity | Responses):
            section = "perplexity"
        if isinstance(task, Responses):
            work = partial(responses, task, model)
        else:
            work = partial(_ordinary, task, model, context)
        found.append((section, label(task), work))
    speed = config.speed
    if speed is not None:
        found.append(("speed", "", lambda: speeds(model, speed, config.seed)))
    return found


def responses(task: Responses, model: LoadedModel) -> Metrics:
    """Return the perplexity of right responses, every token scored once."""
    drawn = islice(problems.stream(task.problems, split="eval", seed=task.seed), task.count)
    tokenizer = model.tokenizer
    requests = [
        Request(encode(tokenizer, one.prompt), tokenizer.encode(one.response)) for one in drawn
    ]
    total = -sum(score.logprob for score in model.scorer().score(requests))
    tokens = sum(len(request.target) for request in requests)
    if not math.isfinite(total):
        raise ValueError("the model returned log-likelihoods that are not finite")
    return {
        "nll": total / tokens,
        "perplexity": math.exp(min(total / tokens, 700)),
        "tokens": tokens,
    }


def _ordinary(task: Any, model: LoadedModel, context: run.Context) -> Metrics:
    return _figures(run.perform(task, model, context))


def _figures(metrics: Metrics) -> Metrics:
    """Return a task's figures without lists; those of needles are the best measure there is."""
    for measure in ("generation", "likelihood"):
        if measure in metrics:
            metrics = {**metrics, **metrics[measure], "measure": measure}
            break
    left_out = (*_BULKY, "generation", "likelihood")
    return {name: value for name, value in metrics.items() if name not in left_out}


def sizes(model: LoadedModel, prefill_chunk: int) -> Metrics:
    """Return the bytes of a full cache of one sequence.

    `allocated` as the model runs here, the rest with exact parts in bfloat16, so that a model that
    runs in float32 does not make a cache look twice as large.
    """
    policy = model.cache or Dense()

    def size(dtype: str) -> CacheBytes:
        return cache_bytes(
            model.model.config, policy, context=model.limit, max_new=prefill_chunk, dtype=dtype
        )

    found = size("bfloat16")
    return {
        "context": model.limit,
        "allocated": size(model.model.execution.dtype).total,
        "total": found.total,
        "per_token": found.per_token,
        "average_bits": found.average_bits,
        "compression": found.compression,
    }


def speeds(model: LoadedModel, settings: CacheSpeed, seed: int) -> Metrics:
    """Return tokens/s of prefill and of decoding at a nearly full cache, medians over repeats."""
    length = model.limit - settings.new_tokens
    generator = Generator(
        model.model,
        model.params,
        cache=model.cache or Dense(),
        capacity=model.limit,
        batch_size=settings.batch,
        prefill_chunk=model.prefill_chunk,
    )
    vocabulary = model.model.config.vocab_size
    prompts = random_prompts(vocabulary, settings.batch, length, seed)
    sampling = greedy(settings.new_tokens)
    generator.generate(prompts, sampling)
    stats = [generator.generate(prompts, sampling).stats for _ in range(settings.repeats)]
    prefill = [settings.batch * length / one.prefill_seconds for one in stats]
    return {
        **asdict(settings),
        "prompt_tokens": length,
        "prefill_tokens_per_second": float(np.median(prefill)),
        "decode_tokens_per_second": float(np.median([one.tokens_per_second for one in stats])),
        "step_ms": 1e3 * float(np.median([one.tpot_seconds for one in stats])),
    }
