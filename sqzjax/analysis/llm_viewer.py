# SPDX-License-Identifier: Apache-2.0
"""The operator table of LLM-Viewer (arXiv 2402.16363) with its own conventions, for comparison.

Kept apart because several conventions are known slips: scores travel through memory, queries are
read with all heads, the head counts one operation per multiply-add and one sequence's activations,
the gated activation works on the hidden width, quantization metadata is ignored. Use it to check
against published tables; `sqzjax.analysis.operators` is the model to rely on.
"""

from sqzjax.analysis.operators import Operator
from sqzjax.analysis.workload import Precision, Workload
from sqzjax.models.config import ModelConfig


def compat_operators(
    model: ModelConfig, precision: Precision, workload: Workload
) -> tuple[Operator, ...]:
    """List LLM-Viewer's operators without flash attention, on one device."""
    if workload.tensor_parallel != 1:
        raise ValueError(
            f"tensor_parallel={workload.tensor_parallel} must be 1 with compat=True; "
            "use compat=False for several devices"
        )
    layer = (
        *_linears(model, precision, workload),
        *_attention(model, precision, workload),
    )
    head = Operator(
        name="lm_head",
        flops=workload.batch * model.hidden_size * model.embedding_size,
        weight_bytes=model.hidden_size * model.embedding_size * precision.weight_bits / 8,
        activation_read=model.hidden_size * precision.activation_bits / 8,
        activation_write=model.embedding_size * precision.activation_bits / 8,
        low_precision=precision.low_precision,
    )
    rest = _elementwise(model, precision, workload)
    return (*layer, *rest, head)


def _linears(model: ModelConfig, precision: Precision, workload: Workload) -> list[Operator]:
    width, ffn = model.hidden_size, model.intermediate_size
    kv_width = model.num_kv_heads * model.head_dim
    shapes = {
        "q_proj": (width, width),
        "k_proj": (width, kv_width),
        "v_proj": (width, kv_width),
        "out_proj": (width, width),
        "gate_proj": (width, ffn),
        "up_proj": (width, ffn),
        "down_proj": (ffn, width),
    }
    tokens = workload.batch * workload.queries
    result = []
    for name, (inputs, outputs) in shapes.items():
        cached = name in ("k_proj", "v_proj")
        result.append(
            Operator(
                name=name,
                count=model.num_layers,
                flops=2 * tokens * inputs * outputs,
                weight_bytes=inputs * outputs * precision.weight_bits / 8,
                activation_read=tokens * inputs * precision.activation_bits / 8,
                activation_write=tokens * outputs * precision.activation_bits / 8 * (not cached),
                kv_write=tokens * outputs * precision.kv_bits / 8 * cached,
                low_precision=precision.low_precision,
            )
        )
    return result


def _attention(model: ModelConfig, precision: Precision, workload: Workload) -> list[Operator]:
    tokens = workload.batch * workload.queries
    scores = tokens * model.num_heads * workload.context
    query_bytes = tokens * model.num_heads * model.head_dim * precision.activation_bits / 8
    score_bytes = scores * precision.activation_bits / 8
    kv_values = workload.batch * workload.context * model.num_kv_heads * model.head_dim
    common = {
        "count": model.num_layers,
        "flops": 2 * scores * model.head_dim,
        "kv_read": kv_values * precision.kv_bits / 8,
        "low_precision": precision.low_precision,
    }
    return [
        Operator(
            name="qk_matmul",
            activation_read=query_bytes,
            activation_write=score_bytes,
            **common,
        ),
        Operator(
            name="sv_matmul",
            activation_read=score_bytes,
            activation_write=query_bytes,
            **common,
        ),
        _moves(model, precision, "softmax", 5 * scores, scores, scores),
    ]


def _elementwise(model: ModelConfig, precision: Precision, workload: Workload) -> list[Operator]:
    size = workload.batch * workload.queries * model.hidden_size
    return [
        _moves(model, precision, "attn_norm", 7 * size, size, size),
        _moves(model, precision, "mlp_norm", 7 * size, size, size),
        _moves(model, precision, "attn_add", size, size, size),
        _moves(model, precision, "mlp_add", size, size, size),
        _moves(model, precision, "mlp_act", 2 * size, 2 * size, size),
    ]


def _moves(
    model: ModelConfig,
    precision: Precision,
    name: str,
    operations: int,
    read: int,
    written: int,
) -> Operator:
    """LLM-Viewer counts element-wise operations against the matrix peak."""
    return Operator(
        name=name,
        count=model.num_layers,
        flops=operations,
        activation_read=read * precision.activation_bits / 8,
        activation_write=written * precision.activation_bits / 8,
        low_precision=precision.low_precision,
    )
