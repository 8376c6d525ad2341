# SPDX-License-Identifier: Apache-2.0
"""Named sizes of real models, and the small ones that this project trains and measures."""

from dataclasses import replace

from sqzjax.models.config import ModelConfig, RopeConfig, SpecialTokens


def _llama(**fields) -> ModelConfig:
    return ModelConfig(family="llama", **fields)


def _qwen(family, vocab=151936, tied=True, **fields) -> ModelConfig:
    biased = family in ("qwen2", "dream")
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        tie_embeddings=tied,
        qkv_bias=biased,
        qk_norm=not biased,
        norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        max_positions=32768 if biased else 40960,
        tokens=SpecialTokens(eos=(151645, 151643), pad=151643),
        **fields,
    )


def _llama3_rope(factor: float) -> RopeConfig:
    return RopeConfig(theta=5e5, kind="llama3", factor=factor, original_max_positions=8192)


_LLAMA2_7B = _llama(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    max_positions=4096,
    tokens=SpecialTokens(bos=1, eos=(2,)),
)
_LLAMA3_8B = _llama(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    rope=RopeConfig(theta=5e5),
    max_positions=8192,
    tokens=SpecialTokens(bos=128000, eos=(128001, 128008, 128009)),
)
_LLAMA31_8B = replace(_LLAMA3_8B, rope=_llama3_rope(8.0), max_positions=131072)
_LLAMA32_1B = replace(
    _LLAMA31_8B,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    head_dim=64,
    rope=_llama3_rope(32.0),
    tie_embeddings=True,
)
_MISTRAL_7B = ModelConfig(
    family="mistral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    sliding_window=4096,
    max_positions=32768,
    tokens=SpecialTokens(bos=1, eos=(2,)),
)
_QWEN3_8B = _qwen(
    "qwen3",
    tied=False,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
)
_QWEN3_4B = replace(_QWEN3_8B, hidden_size=2560, intermediate_size=9728, tie_embeddings=True)
_QWEN3_17B = replace(
    _QWEN3_4B, hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16
)
_QWEN25_7B = _qwen(
    "qwen2",
    vocab=152064,
    tied=False,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
)


def _sdar(body: ModelConfig) -> ModelConfig:
    return replace(
        body,
        family="sdar",
        mask="block_causal",
        block_size=4,
        tie_embeddings=False,
        max_positions=32768,
        tokens=replace(body.tokens, mask=151669),
    )


SIZES: dict[str, ModelConfig] = {
    "llama1_7b": replace(_LLAMA2_7B, norm_eps=1e-6, max_positions=2048),
    "llama1_65b": replace(
        _LLAMA2_7B,
        hidden_size=8192,
        intermediate_size=22016,
        num_layers=80,
        num_heads=64,
        num_kv_heads=64,
        max_positions=2048,
    ),
    "llama2_7b": _LLAMA2_7B,
    "llama2_13b": replace(
        _LLAMA2_7B,
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
    ),
    "llama3_8b": _LLAMA3_8B,
    "llama3.1_8b": _LLAMA31_8B,
    "llama3.1_70b": replace(
        _LLAMA31_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64
    ),
    "llama3.2_1b": _LLAMA32_1B,
    "llama3.2_3b": replace(
        _LLAMA32_1B, hidden_size=3072, num_layers=28, num_heads=24, head_dim=128
    ),
    "mistral_7b_v0.1": _MISTRAL_7B,
    "mistral_7b_v0.3": replace(
        _MISTRAL_7B,
        vocab_size=32768,
        embedding_size=32768,
        sliding_window=None,
        rope=RopeConfig(theta=1e6),
    ),
    "qwen2.5_0.5b": _qwen(
        "qwen2",
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
    ),
    "qwen2.5_1.5b": _qwen(
        "qwen2",
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
    ),
    "qwen2.5_3b": _qwen(
        "qwen2",
        hidden_size=2048,
        intermediate_size=11008,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
    ),
    "qwen2.5_7b": _QWEN25_7B,
    "qwen3_0.6b": replace(_QWEN3_17B, hidden_size=1024, intermediate_size=3072),
    "qwen3_1.7b": _QWEN3_17B,
    "qwen3_4b": _QWEN3_4B,
    "qwen3_8b": _QWEN3_8B,
    "llada_8b": ModelConfig(
        family="llada",
        vocab_size=126464,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=32,
        num_heads=32,
        rope=RopeConfig(theta=5e5),
        max_positions=4096,
        mask="bidirectional",
        tokens=SpecialTokens(eos=(126081,), pad=126081, mask=126336),
    ),
    "dream_7b": replace(
        _QWEN25_7B,
        family="dream",
        mask="bidirectional",
        shift_logits=True,
        max_positions=131072,
        tokens=SpecialTokens(eos=(151643,), pad=151643, mask=151666),
    ),
    "sdar_1.7b": _sdar(_QWEN3_17B),
    "sdar_4b": _sdar(_QWEN3_4B),
    "sdar_8b": _sdar(_QWEN3_8B),
    "stories260k": _llama(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_layers=5,
        num_heads=8,
        num_kv_heads=4,
        max_positions=512,
        tie_embeddings=True,
        tokens=SpecialTokens(bos=1, eos=(2,)),
    ),
    "llama_10m": _llama(
        vocab_size=4096,
        hidden_size=320,
        intermediate_size=864,
        num_layers=7,
        num_heads=5,
        max_positions=1024,
    ),
    "llama_25m": _llama(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_layers=6,
        num_heads=8,
        max_positions=2048,
    ),
}
"""Architectures by name. Special tokens are those of the base checkpoints where they are known;
SDAR-1.7B takes Qwen3-1.7B's shapes with untied embeddings (unconfirmed)."""
