# SPDX-License-Identifier: Apache-2.0
"""XQuant-CL: errors that stay those of one layer's codes, in the closed loop and only there."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.qtensor import dequantize, stretch
from sqzjax import config, kvcache
from sqzjax.decode import Generator, SamplingConfig
from sqzjax.kvcache import Dense, XQuant, XQuantCL
from sqzjax.models import Execution
from tests.contracts.decoders import tiny_model
from tests.sqzjax.rebuilt import BATCH, Layers, hidden_states, model_of
from tests.sqzjax.test_xquant import spec_of
from tests.tolerances import CHUNKED, CLOSED_LOOP

TIGHT = {"rtol": CHUNKED["float32"], "atol": CHUNKED["float32"]}
INPUT = XQuantCL(
    bits=2, group_size=8, form="input", residual_length=3, first_layers=1, accumulator="float32"
)
LATENT = replace(INPUT, form="latent", first_layers=2)
BASE, COUNT, LENGTH = 0, 5, 20


@cache
def layers_of(policy, drift=0.3, kv_heads=1):
    return Layers(policy, kv_heads=kv_heads, count=COUNT, length=24, capacity=24, drift=drift)


@cache
def filled(policy, drift=0.3):
    """The layers, their states after LENGTH tokens, and what each hands up, as numpy."""
    layers = layers_of(policy, drift)
    out, states, carries = layers.fill(LENGTH, 10)
    rows = [None if c is None else np.asarray(c)[:, 0, : int(states[-1].coded[0])] for c in carries]
    return layers, states, rows, out


restored = jax.jit(dequantize)
encode = jax.jit(INPUT.encode)


@jax.jit
def stretched(tensor):
    return stretch(tensor.scale.astype(jnp.float32), tensor.codes.shape[2], tensor.width)


def half_steps(state, name="x"):
    """Half a step of the scale that serves each coded element."""
    tensor = state.body[name]
    count = int(state.coded[0])
    scale = stretched(tensor)
    return np.broadcast_to(scale / 2, (*tensor.codes.shape[:3], tensor.width))[:, 0, :count]


def test_the_loop_is_closed():
    """|X - Xhat| is at most half a step of the layer's own codes, however deep it lies."""
    layers, states, rows, _ = filled(INPUT)
    assert states[-1].coded.tolist() == [LENGTH - 3] * BATCH
    means = []
    for i in range(BASE, COUNT):
        error = np.abs(layers.x[i, :, : LENGTH - 3] - rows[i])
        assert np.all(error <= half_steps(states[i]) * (1 + CLOSED_LOOP) + CLOSED_LOOP)
        means.append(error.mean())
    assert max(means[1:]) < 1.5 * min(means[1:])


def test_an_open_loop_would_add_errors_up():
    """The same codes of differences between exact inputs leave the bound and grow with depth."""
    layers, states, _, _ = filled(INPUT)
    count, errors = LENGTH - 3, []
    x = layers.x[:, :, :count]
    rebuilt = np.asarray(restored(encode({"x": x[BASE][:, None]}, None)["x"]))[:, 0]
    for i in range(BASE + 1, COUNT):
        codes = encode({"x": (x[i] - x[i - 1])[:, None]}, None)
        rebuilt = rebuilt + np.asarray(restored(codes["x"]))[:, 0]
        errors.append(np.abs(x[i] - rebuilt))
    assert np.any(errors[-1] > half_steps(states[-1]) * (1 + CLOSED_LOOP) + CLOSED_LOOP)
    assert errors[-1].mean() > 1.5 * np.abs(x[-1] - filled(INPUT)[2][-1]).mean()


@pytest.mark.parametrize("policy", [INPUT, LATENT], ids=["input", "latent"])
@pytest.mark.slow
def test_attention_reads_the_reconstruction_and_the_window(policy):
    layers, states, _, _ = filled(policy)
    out, states, carries = layers.fill(LENGTH + 1, 1, states, start=LENGTH)
    assert policy.first_layers == 1 or carries[0] is None
    for i in range(policy.first_layers - 1, COUNT):
        x = np.array(layers.x[i, :, : LENGTH + 1])
        coded = int(states[i].coded[0])
        x[:, :coded] = np.asarray(carries[i])[:, 0, :coded]
        np.testing.assert_allclose(out[i], layers.reference(i, x, LENGTH, 1), **TIGHT)


@pytest.mark.parametrize("policy", [INPUT, LATENT], ids=["input", "latent"])
def test_codes_do_not_depend_on_how_tokens_came(policy):
    layers, whole, _, _ = filled(policy)
    pieces = layers.fill(LENGTH, 1)[1]
    for i, (a, b) in enumerate(zip(pieces, whole)):
        np.testing.assert_array_equal(a.coded, b.coded)
        for left, right in zip(jax.tree.leaves(a.body), jax.tree.leaves(b.body)):
            np.testing.assert_array_equal(left, right, err_msg=f"layer {i}")


def test_rows_of_other_lengths_change_nothing():
    layers, _, rows, _ = filled(INPUT)
    positions = np.where(np.arange(10) < [[10], [6]], np.arange(10), -1)
    _, states, carries = layers.run(layers.init(), 0, 10, positions)
    assert states[-1].coded.tolist() == [7, 3]
    for i in range(BASE, COUNT):
        for row, count in enumerate((7, 3)):
            found = np.asarray(carries[i])[row, 0, :count]
            np.testing.assert_allclose(found, rows[i][row, :count], **TIGHT)


def test_rollback_then_append_equals_fresh():
    layers, states, rows, _ = filled(INPUT)
    kept = np.full(BATCH, 12, np.int32)
    states = [jax.jit(p.truncate)(s, kept) for p, s in zip(layers.policies, states)]
    _, states, carries = layers.fill(LENGTH, 1, states, start=12)
    for i in range(BASE, COUNT):
        np.testing.assert_allclose(np.asarray(carries[i])[:, 0, : LENGTH - 3], rows[i], **TIGHT)


def test_projections_of_uncoded_latents_are_exact_in_the_closed_loop_only():
    """Bases of layers differ: what lies outside of one is stale, and later deltas must know."""
    policy = replace(LATENT, bits=16, first_bits=16)
    layers, _, rows, _ = filled(policy)
    x = layers.x[:, :, : LENGTH - 3]
    stale = x[policy.first_layers - 1]
    for i in range(policy.first_layers, COUNT):
        down = np.asarray(layers.fitted[i]["both"])[0]
        stale = stale + (x[i] - x[i - 1]) @ down @ down.T
        for kernel in (layers.wk[i], layers.wv[i]):
            np.testing.assert_allclose(rows[i] @ kernel, x[i] @ kernel, **TIGHT)
    assert np.abs(rows[-1] - x[-1]).max() > 0.1  # the inputs themselves are not rebuilt
    assert np.abs(stale @ layers.wk[-1] - x[-1] @ layers.wk[-1]).max() > 0.1


@pytest.mark.slow
def test_a_coded_accumulator_keeps_the_bound():
    """Deltas are taken against what it holds, and attention adds them to just that."""
    policy = replace(INPUT, accumulator="int4")
    layers = layers_of(policy)
    _, states, carries = layers.fill(LENGTH, 10)
    count = LENGTH - 3
    for i in range(BASE + 1, COUNT):
        below = np.asarray(restored(carries[i - 1]))[:, 0, :count]
        delta = np.asarray(restored(states[i].body["x"]))[:, 0, :count]
        error = np.abs(layers.x[i, :, :count] - below - delta)
        assert np.all(error <= half_steps(states[i]) * (1 + CLOSED_LOOP) + CLOSED_LOOP)
    out, after, _ = layers.run(states, LENGTH, 1)
    assert np.all(np.isfinite(out))
    last = COUNT - 1
    carries = layers.run(states, LENGTH, 1)[2]
    count += 1
    x = np.array(layers.x[last, :, : LENGTH + 1])
    x[:, :count] = np.asarray(restored(carries[last - 1]))[:, 0, :count]
    x[:, :count] += np.asarray(restored(after[last].body["x"]))[:, 0, :count]
    np.testing.assert_allclose(out[last], layers.reference(last, x, LENGTH, 1), **TIGHT)


def test_a_bfloat16_accumulator_adds_its_own_rounding_only():
    layers, states, rows, _ = filled(replace(INPUT, accumulator="bfloat16"))
    for i in range(BASE, COUNT):
        x = np.asarray(layers.x[i, :, : LENGTH - 3])
        bound = half_steps(states[i]) + np.abs(x).max() * 2.0**-8 + CLOSED_LOOP
        assert np.all(np.abs(x - rows[i].astype(np.float32)) <= bound)


# Layers, bytes, refusals ------------------------------------------------------------------------


def test_the_roles_of_layers():
    policy = XQuantCL(bits=2)
    roles = [policy.layer_policy(i, 5) for i in range(5)]
    assert roles[0] == roles[1] == XQuant(bits=4, residual_length=32)
    assert roles[2] == replace(policy, bits=4, form="input")
    assert roles[3] is roles[4] is policy


@pytest.mark.parametrize("accumulator", ["bfloat16", "int4"])
@pytest.mark.parametrize("capacity", [4096, 8192, 131072])
def test_two_bits_are_a_tenth_of_keys_and_values(capacity, accumulator):
    """Of 32 multi-head layers: states from their arrays, with the one accumulator."""
    policy, spec = XQuantCL(bits=2, accumulator=accumulator), spec_of(capacity)
    total = policy.accumulator_nbytes(spec, 1)
    bits = 16 if accumulator == "bfloat16" else 4.25
    assert total == capacity * 4096 * bits / 8
    for index in range(32):
        layer = policy.layer_policy(index, 32)
        total += layer.nbytes(jax.eval_shape(partial(layer.init, spec, 1)))
    assert 32 * 4 * capacity * 4096 / total >= 10


def test_layers_cannot_be_scanned():
    model = tiny_model().copy(execution=Execution(scan_layers=True))
    with pytest.raises(ValueError, match="scan_layers=False"):
        model.init_caches(XQuantCL(first_layers=1), batch=1, capacity=8, max_new=8)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"first_layers": 0}, "first_layers=0 must be >= 1"),
        ({"bits": 7}, "bits=7"),
        ({"group_size": -1}, "group_size=-1"),
    ],
)
def test_settings_out_of_range_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        XQuantCL(**fields)


def test_configurations_name_the_policy():
    loaded = config.load(kvcache.CacheConfig, {"kind": "xquant_cl", "accumulator": "int4"})
    assert loaded == XQuantCL(accumulator="int4")


def test_sliding_window_layers_keep_all_tokens():
    policy = XQuantCL(bits=8)
    state = jax.eval_shape(lambda: policy.init(replace(spec_of(2048), window=64), 1))
    assert state.slots == 2048


# Whole models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("heads", "auto"),
        ("groups_of_4", "auto"),
        pytest.param("groups_of_8", "auto", marks=pytest.mark.slow),
        pytest.param("heads", "latent", marks=pytest.mark.slow),
        pytest.param("groups_of_8", "input", marks=pytest.mark.slow),
    ],
)
def test_uncoded_storage_equals_an_ordinary_cache_at_every_layer(name, form):
    policy = XQuantCL(
        bits=16, first_bits=16, first_layers=1, form=form, residual_length=1, accumulator="float32"
    )
    found, expected = hidden_states(name, policy)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, **TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heads", pytest.param("groups_of_4", marks=pytest.mark.slow)])
def test_eight_bits_decode_like_a_dense_cache(name):
    model, params = model_of(name)
    sampling = SamplingConfig(max_new_tokens=12, temperature=0, ignore_eos=True)
    prompts = [[42, 49, 9, 50, 32, 34, 40, 22], [10, 8, 10, 15, 59, 17, 41, 47, 20]]
    coded = XQuantCL(
        bits=8, first_bits=8, first_layers=1, group_size=8, residual_length=2, accumulator="float32"
    )
    outs = [Generator(model, params, cache=c).generate(prompts, sampling) for c in (Dense(), coded)]
    np.testing.assert_array_equal(*(out.tokens for out in outs))
