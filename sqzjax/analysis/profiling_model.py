# SPDX-License-Identifier: Apache-2.0
"""The operator table behind arXiv 2510.04146 with its own conventions, for comparison.

Kept apart because its conventions differ from `sqzjax.analysis.operators`: rotary embedding,
sigmoid and product are operators of their own and unfused, an element-wise operator costs one
operation per element, scores and values are products per key/value head whose causal saving is
taken from the smaller output dimension, and the device table states the matrix peak of an A6000 at
1.57 times its data sheet. Use it to reproduce published figures; `operators` is the model to rely
on.
"""

import dataclasses

from sqzjax.analysis.devices import Hardware
from sqzjax.analysis.numbers import Number
from sqzjax.analysis.operators import Operator
from sqzjax.analysis.workload import Precision, Workload
from sqzjax.models.config import ModelConfig

PROFILED_A6000 = Hardware(
    name="A6000 as profiled",
    bandwidth=384 * 2e9,
    peak_flops=2 * 84 * 4 * 256 * 1.41e9,
    peak_vector=84 * 128 * 1.41e9,
    source="arXiv 2510.04146: 84 SM x 4 tensor cores x 256 multiply-adds x 1.41 GHz",
)
"""The device of the published figures; its matrix peak is above the data sheet's."""


def published_operators(
    model: ModelConfig, precision: Precision, workload: Workload
) -> tuple[Operator, ...]:
    """List the operators of one forward pass by the published rules, on one device."""
    if workload.tensor_parallel != 1:
        raise ValueError(
            f"tensor_parallel={workload.tensor_parallel} must be 1 with convention='published'; "
            "use convention='fused' for several devices"
        )
    width, ffn = model.hidden_size, model.intermediate_size
    heads, kv_heads = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    tokens = workload.batch * workload.queries
    bits = precision.activation_bits

    def linear(name: str, inputs: int, outputs: int, rows: int = tokens) -> Operator:
        return Operator(
            name=name,
            flops=2 * rows * inputs * outputs,
            weight_bytes=precision.weight_bytes(inputs, outputs),
            activation_read=rows * inputs * bits / 8,
            activation_write=rows * outputs * bits / 8,
        )

    def element_wise(name: str, size: int, *, operands: int = 1, parameters: int = 0) -> Operator:
        return Operator(
            name=name,
            vector_flops=tokens * size,
            weight_bytes=parameters * bits / 8,
            activation_read=operands * tokens * size * bits / 8,
            activation_write=tokens * size * bits / 8,
        )

    layer = (
        element_wise("attn_norm", width, parameters=2 * width),
        linear("q_proj", width, heads),
        linear("k_proj", width, kv_heads),
        linear("v_proj", width, kv_heads),
        element_wise("q_rope", heads),
        element_wise("k_rope", kv_heads),
        linear("o_proj", heads, width),
        element_wise("attn_residual", width, operands=2),
        element_wise("mlp_norm", width, parameters=2 * width),
        linear("gate_proj", width, ffn),
        linear("up_proj", width, ffn),
        element_wise("sigmoid", ffn),
        element_wise("product", ffn, operands=2),
        linear("down_proj", ffn, width),
        element_wise("mlp_residual", width, operands=2),
    )
    rows = workload.batch * workload.head_rows
    head = (linear("lm_head", width, model.embedding_size, rows),) if rows else ()
    return (
        *(dataclasses.replace(op, count=model.num_layers) for op in layer),
        *_attention(model, precision, workload),
        element_wise("final_norm", width, parameters=2 * width),
        *head,
    )


def _attention(model: ModelConfig, precision: Precision, workload: Workload) -> list[Operator]:
    """Scores, softmax and values of each key/value head and sequence; scores stay on chip."""
    size, keys = model.head_dim, workload.context
    rows = workload.queries * model.num_heads // model.num_kv_heads
    count = model.num_layers * workload.batch * model.num_kv_heads
    queries, cache = rows * size * precision.activation_bits / 8, precision.kv_bytes(keys, size)

    def kept(outputs: int) -> Number:
        """Products of an output with `outputs` columns that a causal mask leaves, per inner one."""
        side = min(rows, outputs) * workload.causal
        return rows * outputs - side * (side - 1) // 2

    return [
        Operator(
            name="scores",
            count=count,
            flops=2 * size * kept(keys),
            activation_read=queries,
            kv_read=cache,
        ),
        Operator(name="softmax", count=count, vector_flops=kept(keys)),
        Operator(
            name="values",
            count=count,
            flops=2 * keys * kept(size),
            activation_write=queries,
            kv_read=cache,
        ),
    ]
