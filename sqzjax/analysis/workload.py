# SPDX-License-Identifier: Apache-2.0
"""What is computed, apart from the model: number formats and the shape of one forward pass."""

import math
from dataclasses import dataclass
from typing import Literal

from sqzjax.analysis.numbers import Number


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Storage format of weights, activations and KV cache, in bits per value.

    Linear kernels and an untied head have `weight_bits` plus, per `weight_group` values along the
    input, `weight_meta_bits` of scale and zero point; a fraction `weight_outliers` is kept as
    sparse 16-bit values with 32-bit indices; `weight_lookup` adds a table of 2^bits 16-bit values
    per output channel. The cache likewise, with the newest `kv_residual` tokens unquantized.
    Everything else (embedding, norms, biases, residual tokens) has `other_bits`. A group of 0
    means no metadata.
    """

    weight_bits: Number = 16
    activation_bits: Number = 16
    kv_bits: Number = 16
    other_bits: Number = 16
    weight_group: int = 0
    weight_meta_bits: Number = 32
    weight_outliers: Number = 0.0
    weight_lookup: bool = False
    kv_group: int = 0
    kv_meta_bits: Number = 32
    kv_outliers: Number = 0.0
    kv_residual: int = 0

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "kv_bits", "other_bits"):
            if not 0 < getattr(self, name) <= 64:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 64]; bf16 is 16")
        for name in ("weight_outliers", "kv_outliers"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1); it is a share")

    @classmethod
    def uniform(cls, bits: Number) -> "Precision":
        """Return the format that stores everything with `bits` bits."""
        return cls(weight_bits=bits, activation_bits=bits, kv_bits=bits, other_bits=bits)

    @property
    def low_precision(self) -> bool:
        """Whether integer matrix units apply: weights, activations and KV have <= 8 bits."""
        return max(self.weight_bits, self.activation_bits, self.kv_bits) <= 8

    def weight_bytes(self, inputs: int, outputs: int) -> Number:
        """Bytes of one quantized `[inputs, outputs]` kernel."""
        values = inputs * outputs
        size = values * self.weight_bits / 8
        if self.weight_group:
            size += outputs * math.ceil(inputs / self.weight_group) * self.weight_meta_bits / 8
        if self.weight_lookup:
            size += outputs * 2 * 2**self.weight_bits
        return size + values * self.weight_outliers * _SPARSE_BYTES

    def kv_bytes(self, tokens: int, width: int) -> Number:
        """Bytes of the keys (or the values) of `tokens` tokens, `width` numbers each."""
        recent = min(tokens, self.kv_residual)
        values = (tokens - recent) * width
        bits = self.kv_bits + (self.kv_meta_bits / self.kv_group if self.kv_group else 0)
        size = values * (bits / 8 + self.kv_outliers * _SPARSE_BYTES)
        return size + recent * width * self.other_bits / 8


_SPARSE_BYTES = 6  # a 16-bit value and its 32-bit index


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One forward pass: `query_tokens` new tokens per sequence that see `context` keys.

    `context` counts cached and new tokens. Autoregressive decoding has 1 query token; speculative
    verification and a cached diffusion block have several; an uncached diffusion step is a prefill
    with `store_kv=False` and `logit_rows=context`. Defaults (None): `query_tokens` is `context` in
    prefill and 1 in decode, `logit_rows` 1 in prefill and `query_tokens` in decode.

    `causal` counts only the scores below the diagonal (kernels that skip masked tiles).
    `query_tile`: queries per pass over K and V when these do not fit on chip; 0 means one pass.
    `tensor_parallel` divides kernels and heads over that many devices; results are per device.
    """

    phase: Literal["prefill", "decode"]
    context: int
    batch: int = 1
    query_tokens: int | None = None
    logit_rows: int | None = None
    causal: bool = False
    store_kv: bool = True
    query_tile: int = 0
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("context", "batch", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.query_tokens is not None and not 1 <= self.query_tokens <= self.context:
            raise ValueError(
                f"query_tokens={self.query_tokens} must lie in [1, context={self.context}]; "
                "context counts the new tokens too"
            )

    @property
    def queries(self) -> int:
        """New tokens per sequence."""
        if self.query_tokens is not None:
            return self.query_tokens
        return self.context if self.phase == "prefill" else 1

    @property
    def head_rows(self) -> int:
        """Rows per sequence that the output head computes."""
        if self.logit_rows is not None:
            return self.logit_rows
        return 1 if self.phase == "prefill" else self.queries

    def scores(self, window: int | None = None) -> int:
        """Attention scores of one head and sequence, under a sliding window if given."""
        queries, past = self.queries, self.context - self.queries
        limit = self.context if window is None else min(window, self.context)
        if not self.causal:
            return queries * limit
        growing = max(0, min(limit - past, queries))  # queries whose view is not yet full
        return growing * past + growing * (growing + 1) // 2 + (queries - growing) * limit

    def keys_read(self, window: int | None = None) -> int:
        """Distinct keys that at least one query sees, times the number of passes over them."""
        queries = self.queries
        keys = self.context if window is None else min(self.context, window + queries - 1)
        return keys * (math.ceil(queries / self.query_tile) if self.query_tile else 1)
