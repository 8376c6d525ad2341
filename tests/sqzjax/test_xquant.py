# SPDX-License-Identifier: Apache-2.0
"""XQuant against attention to what its codes stand for, uncoded caches, and counted bytes."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.qtensor import dequantize
from sqzjax import config, kvcache
from sqzjax.io import hf
from sqzjax.io.tokenizer import load as load_tokenizer
from sqzjax.kvcache import AttentionSpec, rebuild
from sqzjax.kvcache.xquant import XQuant, channel_energy, factorise, is_latent, project
from sqzjax.models import DecoderLM, Execution, fit_cache
from sqzjax.numerics import rms_norm
from tests.contracts.decoders import tiny_model, tiny_params
from tests.sqzjax.rebuilt import BATCH, WIDTH, Layers, hidden_states
from tests.tolerances import CHUNKED, FACTORS_REL, REASSOCIATED, STORED_BYTES

TIGHT = {"rtol": CHUNKED["float32"], "atol": CHUNKED["float32"]}
INPUT = XQuant(bits=4, group_size=8, form="input", residual_length=6)
LATENT = XQuant(bits=4, group_size=8, form="latent", residual_length=6)
BOTH = pytest.mark.parametrize("policy", [INPUT, LATENT], ids=["input", "latent"])
SHAPES = {"input": {}, "latent": {"kv_heads": 1}}


restored = jax.jit(dequantize)


@cache
def layers_of(policy, **fields):
    return Layers(policy, **SHAPES[policy.form] | fields)


def held(layers, state, length):
    """Keys before rotation and values `[B, S, K, H]` that the codes and the window stand for."""
    coded, fitted = int(state.coded[0]), layers.fitted[0]
    uncoded = length - coded
    kept = {name: np.asarray(leaf)[:, :, :uncoded] for name, leaf in state.window.items()}
    codes = {name: np.array(restored(state.body[name]))[:, :, :coded] for name in kept}
    if "first" in state.body:
        codes["k"][..., :1] = np.asarray(state.body["first"])[:, :, :coded]
    whole = {name: np.concatenate([codes[name], kept[name]], axis=2) for name in kept}
    if "x" in whole:
        return layers.project_kv(0, whole["x"][:, 0])
    wide = [
        np.einsum("basw,awp->bsap", whole[name], np.asarray(fitted[name]["up"])) for name in "kv"
    ]
    return layers.finish_kv(0, *(y.reshape(BATCH, length, -1, WIDTH) for y in wide))


@pytest.mark.parametrize("exact_first", [False, True])
@BOTH
def test_attends_to_what_the_codes_and_the_window_stand_for(policy, exact_first):
    policy = replace(policy, exact_first=exact_first)
    layers = layers_of(policy)
    states = layers.fill(39, 13)[1]
    out, states, _ = layers.run(states, 39, 1)
    group = 1 if policy.form == "input" else 8
    assert states[0].coded.tolist() == [(40 - 6) // group * group] * BATCH
    expected = layers.attention(0, *held(layers, states[0], 40), 39, 1)
    np.testing.assert_allclose(out[0], expected, **TIGHT)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
@BOTH
def test_mixed_values_equal_rebuilt_ones(monkeypatch, policy, mixes, shards):
    monkeypatch.setattr(rebuild, "mixes_rows", lambda *_: mixes)
    layers = layers_of(replace(policy, shards=shards), heads=8, kv_heads=2)
    _, states, _ = layers.fill(32, 32)
    out, states, _ = layers.run(states, 32, 3)
    if shards == 1:
        expected = layers.attention(0, *held(layers, states[0], 35), 32, 3)
        np.testing.assert_allclose(out[0], expected, rtol=REASSOCIATED, atol=REASSOCIATED)
    elif policy.form == "latent":
        exact = layers.reference(0, layers.x[0, :, :35], 32, 3)
        assert np.abs(out[0] - exact).mean() < np.abs(exact).mean() / 8


def test_values_are_mixed_where_that_is_less_work():
    heads = {"kv_heads": 32, "head_dim": 128}
    assert rebuild.mixes_rows(4096, 8192, 32, **heads)
    assert not rebuild.mixes_rows(4096, 8192, 32 * 512, **heads)
    assert not rebuild.mixes_rows(4096, 16, 32, **heads)


@BOTH
def test_codes_do_not_depend_on_how_tokens_came(policy):
    layers = layers_of(replace(policy, exact_first=True))
    pieces, whole = layers.fill(39, 1)[1][0], layers.fill(39, 13)[1][0]
    jax.tree.map(np.testing.assert_array_equal, pieces.body, whole.body)
    np.testing.assert_array_equal(pieces.coded, whole.coded)


@BOTH
def test_rollback_then_append_equals_fresh(policy):
    layers = layers_of(replace(policy, exact_first=True))
    states = layers.fill(39, 13)[1]
    states = [jax.jit(policy.truncate)(states[0], np.full(BATCH, 34, np.int32))]
    again = layers.fill(39, 1, states, start=34)[0]
    fresh = layers.fill(39, 1, layers.fill(26, 13)[1], start=26)[0]
    np.testing.assert_allclose(again, fresh, **TIGHT)


def test_a_cache_of_a_single_group_is_written():
    """A body of one group has scales of one row, which must not pass for shared ones."""
    layers = layers_of(replace(LATENT, bits=8, residual_length=0), capacity=8, length=8)
    out, states, _ = layers.fill(8, 8)
    assert states[0].coded.tolist() == [8, 8]
    expected = layers.reference(0, layers.x[0], 0, 8)
    assert np.abs(out[0] - expected).mean() < np.abs(expected).mean() / 20


def test_an_empty_cache_gives_no_bias():
    layers = layers_of(replace(INPUT, residual_length=0))

    def attend(state, q):
        query = layers.query(0, q, jnp.zeros((BATCH, 1), jnp.int32))
        return layers.policies[0].attend(state, query).partial.out

    assert not np.any(jax.jit(attend)(layers.init()[0], layers.q[0, :, :1]))


def test_sinks_stay_exact():
    layers = layers_of(replace(INPUT, bits=2, sinks=2))
    out, states, _ = layers.run(layers.fill(39, 13)[1], 39, 1)
    np.testing.assert_array_equal(np.asarray(states[0].sinks["x"])[:, 0], layers.x[0, :, :2])
    x = np.array(layers.x[0, :, :40])
    x[:, 2:34] = np.asarray(restored(states[0].body["x"]))[:, 0, 2:34]
    np.testing.assert_allclose(out[0], layers.reference(0, x, 39, 1), **TIGHT)


# Factors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_factors_give_the_kernel_back(shards):
    kernel = np.random.default_rng(0).normal(size=(48, 32)).astype(np.float32)
    made = factorise(jnp.asarray(kernel), shards)
    down, up = (np.asarray(made[name], np.float64) for name in ("down", "up"))
    blocks = np.stack(np.split(kernel, shards, axis=1))
    assert down.shape == (shards, 48, 32 // shards)
    np.testing.assert_allclose(down @ up, blocks, rtol=FACTORS_REL, atol=FACTORS_REL)
    eye = np.broadcast_to(np.eye(32 // shards), (shards, 32 // shards, 32 // shards))
    np.testing.assert_allclose(
        np.swapaxes(down, 1, 2) @ down, eye, rtol=FACTORS_REL, atol=FACTORS_REL
    )
    sizes = np.linalg.norm(up, axis=2)
    assert np.all(np.diff(sizes, axis=1) <= 0)


def test_a_shard_depends_on_its_own_heads_alone():
    layers = layers_of(replace(LATENT, shards=2), heads=4, kv_heads=2)
    weights = layers.weights(0)
    scale = np.append(np.arange(WIDTH), np.ones(WIDTH)).astype(np.float32)
    changed = weights._replace(k=jnp.asarray(np.asarray(weights.k) * scale))
    fits = [layers.policies[0].fit(w) for w in (weights, changed)]
    first, second = (np.asarray(fit["k"]["down"]) for fit in fits)
    np.testing.assert_array_equal(first[1], second[1])
    assert np.abs(first[0] - second[0]).max() > FACTORS_REL
    sizes = [
        replace(LATENT, shards=s).nbytes(replace(LATENT, shards=s).init(layers.spec, 1))
        for s in (1, 2)
    ]
    assert sizes[0] <= sizes[1] <= 2 * sizes[0]


def test_latents_wider_than_the_input_have_its_rank():
    layers = layers_of(replace(LATENT, bits=16, residual_length=0), model=16, kv_heads=4)
    out, states, _ = layers.fill(20, 20)
    assert states[0].body["k"].shape[-1] == 16
    np.testing.assert_allclose(out[0], layers.reference(0, layers.x[0, :, :20], 0, 20), **TIGHT)


def test_the_first_channel_holds_most_energy(shared_data, record_property):
    """Of a trained model on text: the direction of the largest singular value stands out."""
    folder = shared_data / "stories260K"
    model_config, params = hf.load(folder, execution=Execution(scan_layers=False))
    model = DecoderLM(model_config, Execution(scan_layers=False))
    text = (shared_data / "tinystories_sample.txt").read_text()[:2000]
    ids = jnp.asarray([load_tokenizer(folder).encode(text)[:256]])
    hidden = jax.jit(lambda p: model.forward(p, ids, return_hidden="all").hidden)(params)
    normed = jax.jit(lambda x, scale: rms_norm(x, scale, model_config.norm_eps))
    energy = jax.jit(lambda x, down: channel_energy(project(x, down)))
    hidden = np.asarray(hidden)
    shares = {"k": [], "v": []}
    for index in range(model_config.num_layers):
        block = params[f"layers_{index}"]
        x = normed(hidden[index], block["attn_norm"]["scale"])
        for name, found in shares.items():
            share = np.asarray(energy(x, factorise(block["attn"][name]["kernel"])["down"]))
            np.testing.assert_allclose(share.sum(), 1.0, rtol=CHUNKED["float32"])
            assert name == "v" or np.argmax(share) == 0
            found.append(float(share[0]))
    record_property("energy_of_channel_0", shares)
    equal = 1 / model_config.num_kv_heads / model_config.head_dim
    assert min(shares["k"]) > 5 * equal and max(shares["v"]) < 2 * equal


# Bytes ------------------------------------------------------------------------------------------


def spec_of(capacity, kv_heads=32):
    return AttentionSpec(
        num_heads=32,
        num_kv_heads=kv_heads,
        head_dim=128,
        model_dim=4096,
        capacity=capacity,
        max_new=512,
        dtype="bfloat16",
    )


@cache
def sizes(policy, capacity, kv_heads):
    """Bytes of the whole state, of its tail, and of 16-bit keys and values."""
    state = jax.eval_shape(lambda: policy.init(spec_of(capacity, kv_heads), 1))
    tail = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.window))
    return policy.nbytes(state), tail, 4 * capacity * kv_heads * 128


@pytest.mark.parametrize("capacity", [4096, 65536])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_are_those_of_the_formats(bits, capacity):
    total, tail, dense = sizes(XQuant(bits=bits), capacity, 32)
    assert tail == 129 * 4096 * 2
    np.testing.assert_allclose(total - tail, dense * (bits + 0.25) / 32, rtol=STORED_BYTES)
    total, tail, dense = sizes(XQuant(bits=bits), capacity, 8)
    assert tail == 2 * 256 * 1024 * 2
    np.testing.assert_allclose(total - tail, dense * (bits + 0.25) / 16, rtol=STORED_BYTES)


@pytest.mark.parametrize("capacity", [4096, 8192, 131072])
def test_two_bits_of_the_input_are_small_with_their_tail(capacity):
    total, _, dense = sizes(XQuant(bits=2), capacity, 32)
    assert dense / total >= 7.6


def test_a_step_never_decodes_the_whole_cache():
    layers = Layers(replace(INPUT, bits=2), model=256, length=2, capacity=16384)
    arrays = layers.init(), layers.x[:, :, :1], layers.q[:, :, :1], np.zeros((BATCH, 1), np.int32)
    program = jax.jit(layers._step, donate_argnums=0).lower(*arrays).compile()
    whole = BATCH * 16384 * 256 * 4
    assert program.memory_analysis().temp_size_in_bytes < whole / 4


def test_the_form_follows_the_widths():
    assert [is_latent("auto", d, 1024) for d in (1024, 2047, 2048, 4096)] == [0, 0, 1, 1]
    assert is_latent("latent", 64, 64) and not is_latent("input", 4096, 8)
    states = [jax.eval_shape(lambda kv=kv: XQuant().init(spec_of(512, kv), 1)) for kv in (17, 16)]
    assert [sorted(state.body) for state in states] == [["x"], ["k", "v"]]


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"bits": 5}, "bits=5 must be one of 2, 3, 4, 8, 16"),
        ({"first_bits": 1}, "first_bits=1"),
        ({"group_size": 0}, "group_size=0"),
        ({"first_layers": -1}, "first_layers=-1"),
        ({"shards": 0}, "shards=0"),
    ],
)
def test_settings_out_of_range_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        XQuant(**fields)


def test_widths_that_groups_do_not_divide_are_refused():
    spec = replace(spec_of(512), model_dim=192)
    with pytest.raises(ValueError, match=r"group_size=128 must divide the 192 .*\[48, 64, 96\]"):
        XQuant(form="input").init(spec, 1)
    with pytest.raises(ValueError, match=r"shards=5 must divide the 32 kv heads"):
        XQuant(form="latent", shards=5).init(spec, 1)
    assert jax.eval_shape(lambda: XQuant(form="input", bits=16).init(spec, 1)).group == 1


def test_missing_factors_are_refused():
    layers = layers_of(LATENT)
    layers.fitted = [None]
    with pytest.raises(ValueError, match=r"was given nothing; make them with .*fit_cache"):
        layers.fill(8, 8)
    layers.fitted = [{"both": np.zeros((1, 2, 2), np.float32)}]
    with pytest.raises(ValueError, match=r"given \['both'\]"):
        layers.fill(8, 8)


def test_adapters_of_keys_and_values_are_refused():
    model = tiny_model(num_kv_heads=1)
    policy = XQuant(residual_length=0)
    params = fit_cache(model, tiny_params(model), policy)
    caches = model.init_caches(policy, batch=1, capacity=8, max_new=8)

    def run(name):
        columns = {"q": 32, "k": 8}[name]
        adapter = {"a": jnp.ones((32, 2)), "b": jnp.ones((2, columns))}
        lora = {f"layers_{i}": {"attn": {name: adapter}} for i in range(2)}
        return jax.eval_shape(
            lambda: model.forward(params, jnp.ones((1, 2), int), caches=caches, lora=lora)
        )

    assert run("q").logits.shape == (1, 2, 61)
    with pytest.raises(ValueError, match="merge the adapter"):
        run("k")


def test_configurations_name_the_policy():
    loaded = config.load(kvcache.CacheConfig, {"kind": "xquant", "bits": 2, "form": "latent"})
    assert loaded == XQuant(bits=2, form="latent")


def test_first_layers_have_bits_of_their_own():
    policy = XQuant(bits=2, first_layers=3)
    assert [policy.layer_policy(i, 5).bits for i in range(5)] == [4, 4, 4, 2, 2]
    plain = XQuant(bits=2)
    assert len({plain.layer_policy(i, 5) for i in range(5)}) == 1
    model = tiny_model().copy(execution=Execution(scan_layers=True))
    with pytest.raises(ValueError, match="scan_layers=False"):
        model.init_caches(replace(policy, first_layers=1), batch=1, capacity=8, max_new=8)


# Whole models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("heads", "auto"),
        ("groups_of_4", "auto"),
        ("groups_of_8", "auto"),
        pytest.param("heads", "latent", marks=pytest.mark.slow),
        pytest.param("groups_of_4", "input", marks=pytest.mark.slow),
        pytest.param("groups_of_8", "input", marks=pytest.mark.slow),
    ],
)
def test_uncoded_storage_equals_an_ordinary_cache_at_every_layer(name, form):
    policy = XQuant(bits=16, form=form, residual_length=2)
    found, expected = hidden_states(name, policy)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, **TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("heads", marks=pytest.mark.slow), "groups_of_4"])
def test_four_more_bits_are_eight_times_as_close_to_a_dense_cache(name):
    """Steps are 16 times as fine; rounding to them is random, hence half of that."""

    def error(bits):
        policy = XQuant(bits=bits, group_size=8, residual_length=2)
        found, expected = hidden_states(name, policy)
        return np.abs(found - expected).max() / np.abs(expected).max()

    assert error(8) < error(4) / 8 < 0.02
