# SPDX-License-Identifier: Apache-2.0
"""Names of Hugging Face tensors and the parameters they fill: data only.

A row is (source name, our path, transpose). `{layer}` stands for the layer number; paths below
`layers/` exist once per layer. PyTorch stores linear weights `[out, in]`, we store `[in, out]`.
Rotary embedding is half-split on both sides, so no row is permuted. Rows whose path a configuration
does not have (biases, norms, a tied head) do not apply.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One tensor of a checkpoint and the parameter it fills."""

    source: str
    path: str
    transpose: bool = False


LLAMA = (
    Row("model.embed_tokens.weight", "embed/embedding"),
    Row("model.layers.{layer}.input_layernorm.weight", "layers/attn_norm/scale"),
    Row("model.layers.{layer}.self_attn.q_proj.weight", "layers/attn/q/kernel", True),
    Row("model.layers.{layer}.self_attn.q_proj.bias", "layers/attn/q/bias"),
    Row("model.layers.{layer}.self_attn.k_proj.weight", "layers/attn/k/kernel", True),
    Row("model.layers.{layer}.self_attn.k_proj.bias", "layers/attn/k/bias"),
    Row("model.layers.{layer}.self_attn.v_proj.weight", "layers/attn/v/kernel", True),
    Row("model.layers.{layer}.self_attn.v_proj.bias", "layers/attn/v/bias"),
    Row("model.layers.{layer}.self_attn.o_proj.weight", "layers/attn/o/kernel", True),
    Row("model.layers.{layer}.self_attn.o_proj.bias", "layers/attn/o/bias"),
    Row("model.layers.{layer}.self_attn.q_norm.weight", "layers/attn/q_norm/scale"),
    Row("model.layers.{layer}.self_attn.k_norm.weight", "layers/attn/k_norm/scale"),
    Row("model.layers.{layer}.post_attention_layernorm.weight", "layers/mlp_norm/scale"),
    Row("model.layers.{layer}.mlp.gate_proj.weight", "layers/mlp/gate/kernel", True),
    Row("model.layers.{layer}.mlp.gate_proj.bias", "layers/mlp/gate/bias"),
    Row("model.layers.{layer}.mlp.up_proj.weight", "layers/mlp/up/kernel", True),
    Row("model.layers.{layer}.mlp.up_proj.bias", "layers/mlp/up/bias"),
    Row("model.layers.{layer}.mlp.down_proj.weight", "layers/mlp/down/kernel", True),
    Row("model.layers.{layer}.mlp.down_proj.bias", "layers/mlp/down/bias"),
    Row("model.norm.weight", "final_norm/scale"),
    Row("lm_head.weight", "head/kernel", True),
)
"""Llama, Mistral, Qwen2, Qwen3, Dream, SDAR."""

LLADA = (
    Row("model.transformer.wte.weight", "embed/embedding"),
    Row("model.transformer.blocks.{layer}.attn_norm.weight", "layers/attn_norm/scale"),
    Row("model.transformer.blocks.{layer}.q_proj.weight", "layers/attn/q/kernel", True),
    Row("model.transformer.blocks.{layer}.q_proj.bias", "layers/attn/q/bias"),
    Row("model.transformer.blocks.{layer}.k_proj.weight", "layers/attn/k/kernel", True),
    Row("model.transformer.blocks.{layer}.k_proj.bias", "layers/attn/k/bias"),
    Row("model.transformer.blocks.{layer}.v_proj.weight", "layers/attn/v/kernel", True),
    Row("model.transformer.blocks.{layer}.v_proj.bias", "layers/attn/v/bias"),
    Row("model.transformer.blocks.{layer}.attn_out.weight", "layers/attn/o/kernel", True),
    Row("model.transformer.blocks.{layer}.ff_norm.weight", "layers/mlp_norm/scale"),
    Row(
        "model.transformer.blocks.{layer}.ff_proj.weight",
        "layers/mlp/gate/kernel",
        True,
    ),
    Row("model.transformer.blocks.{layer}.up_proj.weight", "layers/mlp/up/kernel", True),
    Row("model.transformer.blocks.{layer}.ff_out.weight", "layers/mlp/down/kernel", True),
    Row("model.transformer.ln_f.weight", "final_norm/scale"),
    Row("model.transformer.ff_out.weight", "head/kernel", True),
)
"""LLaDA. `ff_out` is the down projection inside a block and the head one level up."""

TABLES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "llada": LLADA,
    "dream": LLAMA,
    "sdar": LLAMA,
}
"""Table of each `ModelConfig.family`."""

IGNORED = (r"(.*\.)?rotary_emb\.inv_freq",)
"""Patterns of buffers that are recomputed from the configuration, matched against whole names."""
