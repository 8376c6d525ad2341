# SPDX-License-Identifier: Apache-2.0
"""Every decoder with the settings under which it must pass the contract, and a small model.

A lossless decoder emits, greedily, exactly what `plain_greedy` does: the argmax of a full forward
pass over the whole sequence for every token, without any cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.decode import Autoregressive, Decoder
from sqzjax.kvcache import Dense
from sqzjax.models import DecoderLM, Execution, ModelConfig, SpecialTokens
from tests.parameters import drawn

VOCABULARY, EOS = 61, 7


@dataclass(frozen=True)
class DecoderCase:
    """One decoder; `build` returns it with the parameters that it runs on."""

    name: str
    build: Callable[[], tuple[Decoder, Any]]
    lossless: bool = True


def tiny_model(**fields: Any) -> DecoderLM:
    """A two-layer causal model with grouped queries; `fields` change its configuration."""
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_positions": 128,
        "tie_embeddings": True,
        "tokens": SpecialTokens(eos=(EOS,)),
    }
    return DecoderLM(ModelConfig(**(defaults | fields)), Execution(scan_layers=False))


@cache
def tiny_params(model: DecoderLM, scale: float = 1.7) -> Any:
    """Random parameters, by default scaled up so that tokens depend on all of the context."""
    return drawn(model, scale=scale)


@cache
def _forward(model: DecoderLM):
    return jax.jit(lambda params, tokens: model.forward(params, tokens).logits)


def plain_logits(model: DecoderLM, params: Any, tokens: Sequence[int], width: int = 64):
    """Logits at every position, recomputed in one pass without a cache."""
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(model)(params, jnp.asarray(padded))[0, : len(tokens)])


def plain_greedy(
    model: DecoderLM, params: Any, prompt: Sequence[int], count: int, stop_ids=(EOS,)
) -> list[int]:
    """Greedy continuation by full recomputation."""
    tokens = list(prompt)
    for _ in range(count):
        logits = plain_logits(model, params, tokens)[-1, : model.config.vocab_size]
        tokens.append(int(np.argmax(logits)))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


def _autoregressive(cache=Dense(), chunk=512, **fields) -> tuple[Decoder, Any]:
    model = tiny_model(**fields)
    decoder = Autoregressive(model=model, cache=cache, prefill_chunk=chunk)
    return decoder, tiny_params(model)


CASES = (
    DecoderCase("autoregressive", _autoregressive),
    DecoderCase(
        "autoregressive_window",
        lambda: _autoregressive(chunk=8, sliding_window=6, embedding_size=64),
    ),
)
