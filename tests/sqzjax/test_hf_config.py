# SPDX-License-Identifier: Apache-2.0
"""config.json to ModelConfig and back, against published files and transformers' stated rules."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.attention.rope import frequencies
from sqzjax.errors import ConfigError
from sqzjax.io import hf
from sqzjax.io.hf_config import canonical, from_hf, to_hf
from sqzjax.models.config import FAMILIES, ModelConfig, RopeConfig, SpecialTokens
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


# Round trip.


def _rope(draw) -> dict:
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    scale = st.floats(1.0, 64.0)
    values = {"theta": draw(st.floats(1e3, 1e7)), "kind": kind}
    if kind != "default":
        values["factor"] = draw(scale)
    if kind in ("llama3", "yarn"):
        values["original_max_positions"] = draw(st.integers(1, 1 << 20))
    if kind == "llama3":
        low = draw(scale)
        values |= {"low_freq_factor": low, "high_freq_factor": low + draw(scale)}
    if kind == "yarn":
        values |= {
            "beta_fast": draw(scale),
            "beta_slow": draw(scale),
            "truncate": draw(st.booleans()),
        }
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            values[name] = draw(st.none() | scale)
    return values


def _family_values(draw, family, layers):
    values = {}
    flag = draw(st.booleans())
    if family in ("llama", "qwen3", "sdar"):
        values |= {"qkv_bias": flag, "out_bias": flag}
    if family == "llama":
        values["mlp_bias"] = draw(st.booleans())
    if family == "llada":
        values["qkv_bias"] = flag
    if family in ("qwen2", "dream"):
        values["qkv_bias"] = True
    if family in ("qwen3", "sdar"):
        values["qk_norm"] = True
    if family in ("mistral", "qwen2", "qwen3", "sdar"):
        values["sliding_window"] = draw(st.none() | st.integers(1, 100_000))
        if family != "mistral" and values["sliding_window"]:
            marks = st.lists(st.booleans(), min_size=layers, max_size=layers)
            values["window_layers"] = tuple(draw(marks))
    if family in ("llada", "dream"):
        values["mask"] = "bidirectional"
    if family == "dream":
        values["shift_logits"] = True
    if family == "sdar":
        values |= {"mask": "block_causal", "block_size": draw(st.integers(1, 64))}
    return values


@st.composite
def config_values(draw):
    """Draw keyword arguments; `build` makes them a config, outside the strategy.

    Constructors are checked by beartype in tests, and it uses `random`, which hypothesis forbids
    inside strategies.
    """
    family = draw(st.sampled_from(FAMILIES))
    kv_heads, groups, layers = (draw(st.integers(1, n)) for n in (8, 8, 12))
    head_dim = 2 * draw(st.integers(1, 64))
    llada = family == "llada"
    hidden = kv_heads * groups * head_dim if llada else draw(st.integers(1, 8192))
    vocab = draw(st.integers(1, 200_000))
    embedding = vocab + draw(st.integers(0, 300)) if llada else vocab
    token = st.none() | st.integers(0, embedding - 1)
    eos = draw(st.lists(st.integers(0, embedding - 1), max_size=3, unique=True))
    tokens = {"bos": draw(token), "eos": tuple(eos), "pad": draw(token), "mask": draw(token)}
    rope = {"theta": draw(st.floats(1e3, 1e7))} if llada else _rope(draw)
    return dict(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 30_000)),
        num_layers=layers,
        num_heads=kv_heads * groups,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        embedding_size=embedding,
        max_positions=draw(st.integers(1, 1 << 20)),
        norm_eps=draw(st.floats(1e-8, 1e-3)),
        rope=rope,
        tie_embeddings=draw(st.booleans()),
        tokens=tokens,
        **_family_values(draw, family, layers),
    )


def build(values) -> ModelConfig:
    rope, tokens = RopeConfig(**values["rope"]), SpecialTokens(**values["tokens"])
    return ModelConfig(**{**values, "rope": rope, "tokens": tokens})


@settings(max_examples=300, deadline=None)
@given(config_values(), st.sampled_from(["float32", "bfloat16"]))
def test_round_trip(values, dtype):
    config = build(values)
    raw = json.loads(json.dumps(to_hf(config, dtype=dtype)))
    again = from_hf(raw)
    assert again == canonical(config)
    # What canonical form drops has no effect: same windows, same frequencies.
    assert again.layer_windows == config.layer_windows
    for one, other in zip(frequencies(again.rope, 8), frequencies(config.rope, 8)):
        np.testing.assert_array_equal(one, other)
    assert raw["torch_dtype"] == raw["dtype"] == dtype
    assert isinstance(raw["architectures"], list)


@settings(max_examples=100, deadline=None)
@given(config_values())
def test_old_and_new_transformers_see_the_same_model(values):
    """Either spelling of the rotary embedding, read alone, gives the model that was written."""
    config = build(values)
    raw = to_hf(config)
    if config.family == "llada":
        return
    old = {name: value for name, value in raw.items() if name != "rope_parameters"}
    new = {n: v for n, v in raw.items() if n not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert from_hf(old) == from_hf(new) == canonical(config)


INEXPRESSIBLE = [
    ("llama", {"qk_norm": True}),
    ("llama", {"out_bias": True}),
    ("llama", {"sliding_window": 5}),
    ("llama", {"embedding_size": 256}),
    ("mistral", {"out_bias": True, "qkv_bias": True}),
    ("mistral", {"sliding_window": 5, "window_layers": (True, False, True)}),
    ("qwen2", {"qkv_bias": False}),
    ("llada", {"mask": "bidirectional", "head_dim": 32}),
    ("llama", {"rope": RopeConfig(kind="linear", factor=2.0, attention_factor=2.0)}),
    ("llada", {"mask": "bidirectional", "rope": RopeConfig(kind="linear", factor=2.0)}),
]


@pytest.mark.parametrize("family, changes", INEXPRESSIBLE)
def test_what_the_file_cannot_say_is_not_exported(family, changes):
    with pytest.raises(ConfigError, match=list(changes)[-1]):
        to_hf(body(family, **changes))


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llada", {"mask": "block_causal", "block_size": 32}),
        (
            "dream",
            {"mask": "block_causal", "block_size": 8, "shift_logits": True, "qkv_bias": True},
        ),
        (
            "qwen2",
            {"mask": "block_causal", "block_size": 32, "shift_logits": True, "qkv_bias": True},
        ),
        ("llama", {"mask": "bidirectional"}),
    ],
)
def test_a_converted_model_keeps_its_mask_under_a_key_of_its_own(family, changes):
    config = body(family, **changes)
    raw = to_hf(config)
    assert from_hf(json.loads(json.dumps(raw))) == canonical(config)
    assert set(raw["sqzjax"]) <= {"mask", "block_size", "shift_logits"}
    with pytest.raises(ConfigError, match="sqzjax="):
        from_hf({**raw, "sqzjax": {"mask": 3}})
    with pytest.raises(ConfigError, match="sqzjax="):
        from_hf({**raw, "sqzjax": {"vocab_size": 3}})


def test_unused_rope_fields_do_not_prevent_export():
    config = body("llama", rope=RopeConfig(original_max_positions=512, beta_fast=7.0))
    assert from_hf(to_hf(config)) == replace(config, rope=RopeConfig())
