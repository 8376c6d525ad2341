# SPDX-License-Identifier: Apache-2.0
"""Caches of packed keys and values: any quantizer for either, before or after rotation.

`Quantized` is the general form, the control of every comparison and what users run in practice
(INT8, INT4, FP8, NormalFloat); methods with a name of their own are settings of it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from sqzjax.attention import quantized
from sqzjax.attention.partial import Partial
from sqzjax.kvcache.base import AttentionSpec, NewTokens, Query
from sqzjax.kvcache.coded import CodedCache, CodedState
from sqzjax.quant import Codebook, QTensor, Quantizer, QuantizerConfig, Uniform, dequantize
from sqzjax.typing import Array, PyTree


class KeyValueCache(CodedCache):
    """Base of caches whose body is one `QTensor` of keys and one of values, `[B, K, S, H]`."""

    rope: str = "post"
    """Whether keys are coded "pre" or "post" rotation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.quantizers  # noqa: B018  (they check their own settings)

    @property
    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        """Return the quantizers of keys and values."""
        raise NotImplementedError

    def group(self, spec: AttentionSpec) -> int:
        for quantizer in self.quantizers:
            quantizer.check(spec.head_dim)
        return math.lcm(*(quantizer.token_group for quantizer in self.quantizers))

    def keep(self, new: NewTokens) -> PyTree:
        k = new.k_pre if self.rope == "pre" else new.k
        return {"k": jnp.moveaxis(k, 2, 1), "v": jnp.moveaxis(new.v, 2, 1)}

    def encode(self, kept: PyTree, fitted: PyTree) -> PyTree:
        fitted = fitted or {}
        key, value = self.quantizers
        k, v = key.encode(kept["k"], fitted.get("k")), value.encode(kept["v"], fitted.get("v"))
        # What all tokens share is not kept by every sequence but put back where it is read.
        return {"k": key.strip(k, fitted.get("k")), "v": value.strip(v, fitted.get("v"))}

    def complete(self, codes: PyTree, fitted: PyTree) -> tuple[QTensor, QTensor]:
        """Return the codes of keys and values with what all tokens share."""
        fitted = fitted or {}
        key, value = self.quantizers
        k, v = (codes[name] for name in ("k", "v"))
        return key.complete(k, fitted.get("k")), value.complete(v, fitted.get("v"))

    def decode(self, codes: PyTree, kept: PyTree) -> PyTree:
        return dict(zip(("k", "v"), map(dequantize, self.complete(codes, None))))

    def attend_body(self, state: CodedState, query: Query, starts: Array, limits: Array) -> Partial:
        before = self.rope == "pre"
        k, v = self.complete(state.body, query.fitted)
        return quantized.attend_span(
            query.q_pre if before else query.q,
            k,
            v,
            state.coded,
            starts,
            limits,
            query_positions=query.positions if before else None,
            rotary=query.rotary if before else None,
            scale=query.scale,
        )

    def exact(self, kept: PyTree, query: Query, positions: Array) -> tuple[Array, Array]:
        if self.rope == "post":
            return kept["k"], kept["v"]
        k = query.rotate(jnp.moveaxis(kept["k"], 1, 2), jnp.maximum(positions, 0))
        return jnp.moveaxis(k, 2, 1), kept["v"]


@dataclass(frozen=True, kw_only=True)
class Quantized(KeyValueCache):
    """Keys by one quantizer, values by another; the newest `residual_length` tokens uncoded."""

    kind: Literal["quantized"] = "quantized"
    key: QuantizerConfig = Uniform()
    value: QuantizerConfig = Uniform()
    rope: Literal["pre", "post"] = "post"
    residual_length: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key", "value"):
            quantizer = getattr(self, name)
            if not isinstance(quantizer, Quantizer):
                raise ValueError(f"{name}={quantizer!r} must be a quantizer, as Uniform(bits=4)")
            if isinstance(quantizer, Codebook) and quantizer.axis == "channel":
                raise ValueError(
                    f"{name}.axis='channel' must be 'token' for kind='codebook': scales per channel"
                    " need a calibration; use the cache kind='kvquant'"
                )

    @property
    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        return self.key, self.value


@dataclass(frozen=True, kw_only=True)
class KIVI(KeyValueCache):
    """Keys per channel, values per token, in groups (arXiv 2402.02750).

    `bits` 2 for multi-head models, 4 where a few heads serve many queries; `rope` "pre" is the
    variant of arXiv 2508.10395 (with groups of 128). The published cache flushes
    `residual_length` keys at once and values one by one; here both go group by group, so that
    never fewer than `residual_length` tokens are exact. Average bits: bits + 32 / group_size.
    """

    kind: Literal["kivi"] = "kivi"
    bits: int = 2
    group_size: int = 32
    residual_length: int = 128
    rope: Literal["pre", "post"] = "post"

    @property
    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        return (
            Uniform(bits=self.bits, axis="channel", group_size=self.group_size),
            Uniform(bits=self.bits, axis="token", group_size=self.group_size),
        )
