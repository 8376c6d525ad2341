# SPDX-License-Identifier: Apache-2.0
"""Shapes of a model's parameters from its configuration alone: no jax, no memory.

Used to check checkpoints before anything is allocated; agrees with `DecoderLM.abstract_params`.
"""

from sqzjax.models.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def param_shapes(config: ModelConfig, scan_layers: bool) -> Shapes:
    """Return the shape of each parameter by path, e.g. `layers/attn/q/kernel` -> `(L, D, N*H)`.

    `scan_layers=False` gives the unrolled layout: `layers_0/attn/q/kernel` -> `(D, N*H)`.
    """
    shapes: Shapes = {"embed/embedding": (config.embedding_size, config.hidden_size)}
    block = _block_shapes(config)
    if scan_layers:
        shapes |= {f"layers/{path}": (config.num_layers, *shape) for path, shape in block.items()}
    else:
        for layer in range(config.num_layers):
            shapes |= {f"layers_{layer}/{path}": shape for path, shape in block.items()}
    shapes["final_norm/scale"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["head/kernel"] = (config.hidden_size, config.embedding_size)
    return shapes


def _block_shapes(config: ModelConfig) -> Shapes:
    model, ffn = config.hidden_size, config.intermediate_size
    query = config.num_heads * config.head_dim
    key = config.num_kv_heads * config.head_dim
    shapes: Shapes = {"attn_norm/scale": (model,)}
    linears = {
        "attn/q": (model, query, config.qkv_bias),
        "attn/k": (model, key, config.qkv_bias),
        "attn/v": (model, key, config.qkv_bias),
        "attn/o": (query, model, config.out_bias),
        "mlp/gate": (model, ffn, config.mlp_bias),
        "mlp/up": (model, ffn, config.mlp_bias),
        "mlp/down": (ffn, model, config.mlp_bias),
    }
    for path, (inputs, outputs, biased) in linears.items():
        shapes[f"{path}/kernel"] = (inputs, outputs)
        if biased:
            shapes[f"{path}/bias"] = (outputs,)
    if config.qk_norm:
        shapes |= {f"attn/{name}/scale": (config.head_dim,) for name in ("q_norm", "k_norm")}
    shapes["mlp_norm/scale"] = (model,)
    return shapes
