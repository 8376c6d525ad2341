# SPDX-License-Identifier: Apache-2.0
"""config.json to ModelConfig and back, against published files and transformers' stated rules."""

import json

import pytest

from sqzjax.io import hf
from sqzjax.io.hf_config import from_hf, to_hf
from sqzjax.models.config import ModelConfig, RopeConfig, SpecialTokens
from sqzjax.models.sizes import SIZES

BODY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
LLADA = {
    "model_type": "llada",
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 3,
    "mlp_hidden_size": 96,
    "vocab_size": 199,
    "max_sequence_length": 512,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "include_bias": False,
    "weight_tying": False,
}

# As published; keys without influence on the architecture left out.
PUBLISHED = {
    "llama1_7b": {  # predates num_key_value_heads and rope_theta
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": -1,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "llama3.1_8b": {
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "mistral_7b_v0.1": {
        "model_type": "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5_7b": {
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "eos_token_id": [151645, 151643],
        "pad_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "qwen3_4b": {
        "model_type": "qwen3",
        "attention_bias": False,
        "eos_token_id": [151645, 151643],
        "pad_token_id": 151643,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "llada_8b": {
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 4096,
        "embedding_size": 126464,
        "eos_token_id": 126081,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": 126336,
        "max_sequence_length": 4096,
        "mlp_hidden_size": 12288,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": 32,
        "n_kv_heads": 32,
        "n_layers": 32,
        "pad_token_id": 126081,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "tie_word_embeddings": True,
        "vocab_size": 126464,
        "weight_tying": False,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_the_preset(name):
    assert from_hf(PUBLISHED[name]) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
def test_presets_survive_export(name):
    assert from_hf(json.loads(json.dumps(to_hf(SIZES[name])))) == SIZES[name]


def test_stories_folder(shared_data):
    assert hf.read_config(shared_data / "stories260K") == SIZES["stories260k"]


def read(model_type="llama", **changes):
    return from_hf({"model_type": model_type, **BODY, **changes})


def body(family, **changes):
    values = {
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_positions": 512,
        "norm_eps": 1e-6,
    }
    return ModelConfig(family=family, **(values | changes))


FAMILY_CASES = [
    ("llama", {}, {}),
    ("llama", {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
    ("llama", {"mlp_bias": True}, {"mlp_bias": True}),
    ("llama", {"head_dim": 32}, {"head_dim": 32}),
    ("llama", {"head_dim": None, "num_key_value_heads": None}, {"num_kv_heads": 4}),
    ("llama", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
    ("llama", {"sliding_window": 7}, {}),
    ("mistral", {}, {"sliding_window": 4096}),
    ("mistral", {"sliding_window": None}, {}),
    ("mistral", {"sliding_window": 16}, {"sliding_window": 16}),
    ("qwen2", {}, {"qkv_bias": True}),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, {"qkv_bias": True}),
    (
        "qwen2",
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
        {"qkv_bias": True, "sliding_window": 16, "window_layers": (False, True, True)},
    ),
    (
        "qwen2",
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
        {"qkv_bias": True, "sliding_window": 16},
    ),
    (
        "qwen2",
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3},
        {"qkv_bias": True},
    ),
    (
        "qwen3",
        {
            "sliding_window": 16,
            "use_sliding_window": True,
            "max_window_layers": 28,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {
            "qk_norm": True,
            "head_dim": 128,
            "sliding_window": 16,
            "window_layers": (True, False, True),
        },
    ),
    ("qwen3", {"head_dim": 32}, {"qk_norm": True, "head_dim": 32}),
    (
        "qwen3",
        {"attention_bias": True},
        {"qk_norm": True, "head_dim": 128, "qkv_bias": True, "out_bias": True},
    ),
    # An encoder made of a language model: transformers drops the causal mask.
    ("llama", {"is_causal": False}, {"mask": "bidirectional"}),
    ("qwen3", {"is_causal": True}, {"qk_norm": True, "head_dim": 128}),
    ("mistral", {"is_causal": False, "sliding_window": None}, {"mask": "bidirectional"}),
    ("Dream", {}, {"qkv_bias": True, "mask": "bidirectional", "shift_logits": True}),
    ("sdar", {}, {"qk_norm": True, "head_dim": 128, "mask": "block_causal", "block_size": 4}),
    (
        "sdar",
        {"block_size": 16, "mask_token_id": 198},
        {
            "qk_norm": True,
            "head_dim": 128,
            "mask": "block_causal",
            "block_size": 16,
            "tokens": SpecialTokens(mask=198),
        },
    ),
]


@pytest.mark.parametrize("model_type, raw, expected", FAMILY_CASES)
def test_family_rules(model_type, raw, expected):
    assert read(model_type, **raw) == body(model_type.lower(), **expected)


LLADA_CASES = [
    ({}, {"num_kv_heads": 4}),
    ({"n_kv_heads": 2}, {"num_kv_heads": 2}),
    ({"multi_query_attention": True}, {"num_kv_heads": 1}),
    ({"n_kv_heads": None, "multi_query_attention": False}, {"num_kv_heads": 4}),
    ({"embedding_size": 256}, {"num_kv_heads": 4, "embedding_size": 256}),
    ({"weight_tying": True, "tie_word_embeddings": False}, {"tie_embeddings": True}),
    ({"weight_tying": False, "tie_word_embeddings": True}, {"tie_embeddings": False}),
    ({"mlp_hidden_size": None, "mlp_ratio": 4}, {"intermediate_size": 256}),
    ({"include_qkv_bias": True}, {"qkv_bias": True}),
]


@pytest.mark.parametrize("raw, expected", LLADA_CASES)
def test_llada_rules(raw, expected):
    expected = {"num_kv_heads": 4, "mask": "bidirectional", "norm_eps": 1e-5} | expected
    assert from_hf(LLADA | raw) == body("llada", **expected)


_ORIGINAL = "original_max_position_embeddings"
ROPE_CASES = [
    ({}, {"theta": 1e4}),
    ({"rope_theta": 5e5}, {"theta": 5e5}),
    ({"rope_theta": 500000}, {"theta": 5e5}),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, {"theta": 5e5}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"theta": 5e5}),
    ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, {"theta": 5e5}),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, {"kind": "linear", "factor": 2.0}),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"kind": "linear", "factor": 2.0}),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"kind": "linear", "factor": 2.0},
    ),
    (  # both spellings in one file, as written for old and new readers
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        },
        {"theta": 5e5, "kind": "linear", "factor": 2.0},
    ),
    (  # yarn falls back to the model's own length
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"kind": "yarn", "factor": 4.0, "original_max_positions": 512},
    ),
    (
        {
            "rope_scaling": {
                "rope_type": None,
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": None,
                "beta_fast": None,
            }
        },
        {"kind": "yarn", "factor": 4.0, "original_max_positions": 512},
    ),
    (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16,
                "beta_slow": 2,
                "attention_factor": 1.5,
                "mscale": 0.7,
                "mscale_all_dim": 0.9,
                "truncate": False,
            }
        },
        {
            "theta": 1e6,
            "kind": "yarn",
            "factor": 4.0,
            "original_max_positions": 128,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.5,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
            "truncate": False,
        },
    ),
    (  # transformers reads an attention factor for yarn only
        {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 3.0}},
        {"kind": "linear", "factor": 2.0},
    ),
    ({"partial_rotary_factor": 1}, {}),
    ({"rope_theta": None}, {"theta": 1e4}),
    ({"rope_theta": None, "rope_parameters": {"rope_theta": 777.0}}, {"theta": 777.0}),
    (
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "yarn", "factor": 4.0, _ORIGINAL: 64},
        },
        {"kind": "yarn", "factor": 4.0, "original_max_positions": 64},
    ),
]


@pytest.mark.parametrize("raw, expected", ROPE_CASES)
def test_rope_spellings(raw, expected):
    assert read(**raw).rope == RopeConfig(**expected)


def test_stop_ids_of_both_files_are_merged(tmp_path):
    config = {"model_type": "llama", **BODY, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hf.read_config(tmp_path).tokens == SpecialTokens(eos=(2,))
    generation = {"eos_token_id": [7, 2], "pad_token_id": 5, "bos_token_id": 1, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert hf.read_config(tmp_path).tokens == SpecialTokens(bos=1, eos=(2, 7), pad=5)
