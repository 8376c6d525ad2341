# SPDX-License-Identifier: Apache-2.0
"""Operations and memory traffic of every operator of the decoder, from its configuration.

Follows the operator model of arXiv 2402.16363 with its known slips corrected: attention is fused
(scores never reach memory) and reads K and V once per key/value head, the head counts two
operations per multiply-add and every sequence, the gated activation works on the feed-forward
width, and quantization metadata is counted. `sqzjax.analysis.llm_viewer` keeps the original
conventions. Rotary embedding, the embedding lookup and sampling are left out.

One multiply-add is two operations. Figures are lower bounds: no launch overhead, perfect reuse.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass

from sqzjax.analysis.numbers import Number
from sqzjax.analysis.workload import Precision, Workload
from sqzjax.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Cost of one execution of an operator that runs `count` times in a forward pass.

    `flops` run on matrix units, `vector_flops` elsewhere (norms, softmax, dequantization); the
    other fields are bytes. `low_precision` selects the int8 peak. `link_bytes` cross between
    devices.
    """

    name: str
    count: int = 1
    flops: Number = 0.0
    vector_flops: Number = 0.0
    weight_bytes: Number = 0.0
    activation_read: Number = 0.0
    activation_write: Number = 0.0
    kv_read: Number = 0.0
    kv_write: Number = 0.0
    link_bytes: Number = 0.0
    low_precision: bool = False

    @property
    def bytes(self) -> Number:
        """Memory traffic of one execution."""
        activations = self.activation_read + self.activation_write
        return self.weight_bytes + activations + self.kv_read + self.kv_write

    @property
    def operations(self) -> Number:
        """Matrix and vector operations of one execution."""
        return self.flops + self.vector_flops


@dataclass(frozen=True)
class _Pass:
    """The three inputs and the sizes that every operator needs."""

    model: ModelConfig
    precision: Precision
    work: Workload

    @property
    def tokens(self) -> int:
        return self.work.batch * self.work.queries

    @property
    def heads(self) -> int:
        return self.model.num_heads // self.work.tensor_parallel

    @property
    def kv_heads(self) -> int:
        return max(1, self.model.num_kv_heads // self.work.tensor_parallel)

    @property
    def ffn(self) -> int:
        return self.model.intermediate_size // self.work.tensor_parallel

    def activation(self, width: Number) -> Number:
        """Bytes of `width` activations for every token."""
        return self.tokens * width * self.precision.activation_bits / 8

    def other(self, values: int) -> Number:
        """Bytes of parameters that are never quantized."""
        return values * self.precision.other_bits / 8


def operators(
    model: ModelConfig,
    precision: Precision,
    workload: Workload,
    *,
    compat: bool = False,
) -> tuple[Operator, ...]:
    """List the operators of one forward pass, in order, with their costs per device.

    Every attribute of `model` is read as in `ModelConfig`. `compat=True` keeps the conventions of
    LLM-Viewer (unfused attention, halved head operations, no metadata).
    """
    if compat:
        from sqzjax.analysis.llm_viewer import compat_operators

        return compat_operators(model, precision, workload)
    _check_parallel(model, workload.tensor_parallel)
    run = _Pass(model, precision, workload)
    layer = (*_attention_block(run), *_mlp_block(run))
    body = [op if op.name == "attention" else _times(op, model.num_layers) for op in layer]
    rows = (_head(run),) if workload.head_rows else ()
    return (*body, _norm(run, "final_norm"), *rows)


def _attention_block(run: _Pass) -> list[Operator]:
    model, width = run.model, run.model.hidden_size
    query_width, kv_width = run.heads * model.head_dim, run.kv_heads * model.head_dim
    bias = model.qkv_bias
    block = [
        _norm(run, "attn_norm"),
        _linear(run, "q_proj", width, query_width, bias=bias),
        _to_cache(run, _linear(run, "k_proj", width, kv_width, bias=bias), kv_width),
        _to_cache(run, _linear(run, "v_proj", width, kv_width, bias=bias), kv_width),
    ]
    if model.qk_norm:
        block += [
            _norm(run, "q_norm", run.heads, model.head_dim),
            _norm(run, "k_norm", run.kv_heads, model.head_dim),
        ]
    block += [_attention(run, window, n) for window, n in Counter(model.layer_windows).items()]
    block.append(_linear(run, "o_proj", query_width, width, bias=model.out_bias))
    return [
        *block,
        *_all_reduce(run, "attn_all_reduce"),
        _residual(run, "attn_residual"),
    ]


def _mlp_block(run: _Pass) -> list[Operator]:
    model, width = run.model, run.model.hidden_size
    return [
        _norm(run, "mlp_norm"),
        _linear(run, "gate_proj", width, run.ffn, bias=model.mlp_bias),
        _linear(run, "up_proj", width, run.ffn, bias=model.mlp_bias),
        Operator(
            name="mlp_act",
            vector_flops=5 * run.tokens * run.ffn,
            activation_read=run.activation(2 * run.ffn),
            activation_write=run.activation(run.ffn),
        ),
        _linear(run, "down_proj", run.ffn, width, bias=model.mlp_bias),
        *_all_reduce(run, "mlp_all_reduce"),
        _residual(run, "mlp_residual"),
    ]


def _linear(run: _Pass, name: str, inputs: int, outputs: int, *, bias: bool) -> Operator:
    precision = run.precision
    return Operator(
        name=name,
        flops=2 * run.tokens * inputs * outputs,
        vector_flops=_dequantize(precision, precision.weight_bits, inputs * outputs),
        weight_bytes=precision.weight_bytes(inputs, outputs) + run.other(outputs * bias),
        activation_read=run.activation(inputs),
        activation_write=run.activation(outputs),
        low_precision=precision.low_precision,
    )


def _to_cache(run: _Pass, op: Operator, width: int) -> Operator:
    """Let a projection write its output to the cache; a pass that stores nothing keeps it."""
    if not run.work.store_kv:
        return op
    written = run.work.batch * run.precision.kv_bytes(run.work.queries, width)
    return dataclasses.replace(op, activation_write=0.0, kv_write=written)


def _attention(run: _Pass, window: int | None, count: int) -> Operator:
    """Fused attention: q and out move once, K and V once per key/value head and sequence."""
    head_dim, precision = run.model.head_dim, run.precision
    scores = run.work.batch * run.heads * run.work.scores(window)
    keys, kv_width = run.work.keys_read(window), run.kv_heads * head_dim
    kv_values = 2 * run.work.batch * keys * kv_width
    return Operator(
        name="attention",
        count=count,
        flops=4 * scores * head_dim,
        vector_flops=5 * scores + _dequantize(precision, precision.kv_bits, kv_values),
        activation_read=run.activation(run.heads * head_dim),
        activation_write=run.activation(run.heads * head_dim),
        kv_read=2 * run.work.batch * precision.kv_bytes(keys, kv_width),
        low_precision=precision.low_precision,
    )


def _norm(run: _Pass, name: str, groups: int = 1, width: int | None = None) -> Operator:
    size = width or run.model.hidden_size
    return Operator(
        name=name,
        vector_flops=7 * run.tokens * groups * size,
        weight_bytes=run.other(size),
        activation_read=run.activation(groups * size),
        activation_write=run.activation(groups * size),
    )


def _residual(run: _Pass, name: str) -> Operator:
    size = run.model.hidden_size
    return Operator(
        name=name,
        vector_flops=run.tokens * size,
        activation_read=run.activation(2 * size),
        activation_write=run.activation(size),
    )


def _head(run: _Pass) -> Operator:
    model, precision = run.model, run.precision
    vocab = model.embedding_size // run.work.tensor_parallel
    rows = run.work.batch * run.work.head_rows
    bits = precision.other_bits if model.tie_embeddings else precision.weight_bits
    size = model.hidden_size * vocab
    stored = (
        run.other(size)
        if model.tie_embeddings
        else precision.weight_bytes(model.hidden_size, vocab)
    )
    return Operator(
        name="lm_head",
        flops=2 * rows * size,
        vector_flops=_dequantize(precision, bits, size),
        weight_bytes=stored,
        activation_read=rows * model.hidden_size * precision.activation_bits / 8,
        activation_write=rows * vocab * precision.activation_bits / 8,
        low_precision=precision.low_precision,
    )


def _all_reduce(run: _Pass, name: str) -> list[Operator]:
    """Ring all-reduce of a block's output: each device sends 2 (p - 1) / p of it."""
    devices = run.work.tensor_parallel
    if devices == 1:
        return []
    share = 2 * (devices - 1) / devices
    return [Operator(name=name, link_bytes=share * run.activation(run.model.hidden_size))]


def _dequantize(precision: Precision, bits: Number, values: Number) -> Number:
    """One vector operation per value that is stored narrower than it is multiplied."""
    return values if bits < precision.activation_bits else 0.0


def _times(op: Operator, count: int) -> Operator:
    return dataclasses.replace(op, count=count)


def _check_parallel(model: ModelConfig, devices: int) -> None:
    sizes = {
        "num_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
        "embedding_size": model.embedding_size,
    }
    for name, value in sizes.items():
        if value % devices:
            raise ValueError(
                f"tensor_parallel={devices} must divide {name}={value}; use a common divisor of "
                f"{list(sizes.values())}"
            )
    kv_heads = model.num_kv_heads
    if kv_heads % devices and devices % kv_heads:
        raise ValueError(
            f"tensor_parallel={devices} must divide num_kv_heads={kv_heads} or be a multiple of "
            "it (key/value heads are then replicated)"
        )
