# SPDX-License-Identifier: Apache-2.0
"""KVQuant with a calibration of a model: what it restores, and calibrations at fault."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.qtensor import dequantize, levels
from sqzjax import calibration
from sqzjax.artefact import read
from sqzjax.calibration_config import CalibrationSettings
from sqzjax.decode import SamplingConfig, generate
from sqzjax.kvcache import KVQuant
from sqzjax.models import DecoderLM, Execution, fingerprint, fit_cache, stack_layers
from sqzjax.quant import Codebook
from tests.contracts.decoders import tiny_model, tiny_params

restored, levels_of = jax.jit(dequantize), jax.jit(levels)
RNG = np.random.default_rng(0)
MODEL = tiny_model()
SETTINGS = CalibrationSettings(bits=(2, 3, 4), outliers=(0.0, 0.05), bins=1024, range_bins=256)


def _samples(count=3, length=24):
    rng = np.random.default_rng(5)
    return [{"tokens": rng.integers(0, 50, (1, length)).astype(np.int32)} for _ in range(count)]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Parameters of the tiny model and the file of its calibration."""
    params = tiny_params(MODEL)
    path = tmp_path_factory.mktemp("calibration") / "kvquant.safetensors"
    calibration.save(path, calibration.calibrate(MODEL, params, _samples(), SETTINGS))
    return params, str(path)


def _logits(policy, params, tokens, chunk=1):
    """Logits of tokens that come a few at a time."""
    params = fit_cache(MODEL, params, policy)
    caches = MODEL.init_caches(policy, batch=len(tokens), capacity=32, max_new=chunk)
    step = jax.jit(lambda tokens, positions, caches: MODEL.forward(
        params, tokens, positions=positions, caches=caches))  # fmt: skip
    outs = []
    for start in range(0, tokens.shape[1], chunk):
        positions = jnp.broadcast_to(jnp.arange(start, start + chunk), (len(tokens), chunk))
        out = step(tokens[:, start : start + chunk], positions, caches)
        caches = out.caches
        outs.append(out.logits)
    return jnp.concatenate(outs, axis=1)


@pytest.mark.slow
def test_more_bits_and_outliers_are_closer_to_the_model(calibrated):
    params, path = calibrated
    tokens = jnp.asarray(np.concatenate([s["tokens"] for s in _samples(3)]))
    exact = MODEL.forward(params, tokens).logits

    def error(**settings):
        policy = KVQuant(calibration=path, **settings)
        return float(jnp.mean((_logits(policy, params, tokens) - exact) ** 2))

    coarse, fine = error(bits=2, outliers=0.0), error(bits=4, outliers=0.0)
    with_slots = error(bits=2, outliers=0.05)
    assert fine < with_slots < coarse, (fine, with_slots, coarse)


def test_q_norm_restores_mean_and_deviation(calibrated):
    params, path = calibrated
    layer = f"layers_{MODEL.config.num_layers - 1}"
    fitted = [
        fit_cache(MODEL, params, KVQuant(bits=2, outliers=0.0, q_norm=on, calibration=path))[layer]
        for on in (False, True)
    ]
    plain, normed = (f["attn"]["cache"]["v"] for f in fitted)
    np.testing.assert_array_equal(plain["table"], normed["table"])
    alpha, beta = np.polyfit(np.asarray(plain["table"])[0], np.asarray(normed["levels"])[0], 1)
    assert 1 < alpha < 1.5 and abs(beta) < 0.1  # decoded numbers spread less than the originals
    x = RNG.normal(size=(4, 8)).astype(np.float32)
    encode = jax.jit(Codebook(bits=2, outliers=0.0).encode)
    one, other = (encode(x, f) for f in (plain, normed))
    np.testing.assert_array_equal(one.codes, other.codes)
    expected = alpha * np.asarray(levels_of(one)) + beta
    np.testing.assert_allclose(levels_of(other), expected, atol=1e-5)


@pytest.mark.slow
def test_generates_with_scanned_and_unrolled_layers(calibrated):
    params, path = calibrated
    policy = KVQuant(bits=4, outliers=0.05, calibration=path)
    prompts = [s["tokens"][0].tolist() for s in _samples(2)]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=4)
    found = [
        generate(
            DecoderLM(MODEL.config, Execution(scan_layers=scan)), p, prompts, sampling, cache=policy
        )
        for scan, p in ((False, params), (True, stack_layers(params)))
    ]
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)


def test_the_policy_names_what_a_calibration_lacks(calibrated, tmp_path):
    params, path = calibrated
    policy = KVQuant(bits=3, outliers=0.05, calibration=path)
    with pytest.raises(ValueError, match=r"python -m train configs/train/calibrate\.yaml"):
        fit_cache(MODEL, params, KVQuant())
    with pytest.raises(ValueError, match=r"bits=6 is not in .*holds 2,3,4"):
        fit_cache(MODEL, params, replace(policy, bits=6))
    with pytest.raises(ValueError, match=r"outliers=0\.02 is not in .*holds 0,0\.05"):
        fit_cache(MODEL, params, replace(policy, outliers=0.02))
    with pytest.raises(ValueError, match="rope=post is not in"):
        fit_cache(MODEL, params, replace(policy, rope="post"))
    other = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    with pytest.raises(ValueError, match="belongs to the model") as caught:
        fit_cache(MODEL, other, policy)
    assert fingerprint(MODEL, params) in str(caught.value)
    assert fingerprint(MODEL, other) in str(caught.value)
    with pytest.raises(ValueError, match="cannot read the calibration"):
        fit_cache(MODEL, params, replace(policy, calibration=str(tmp_path / "none")))
    arrays, metadata = read(path)
    calibration.save(tmp_path / "else", calibration.Artefact(arrays, {**metadata, "kind": "x"}))
    with pytest.raises(ValueError, match="is not one of kvquant"):
        fit_cache(MODEL, params, replace(policy, calibration=str(tmp_path / "else")))
    for older in ("", "2"):  # without a number, and with a digest of the keys' kernels alone
        old = calibration.Artefact(arrays, {**metadata, "format": older})
        calibration.save(tmp_path / "old", old)
        with pytest.raises(ValueError, match="has an older layout; make one with"):
            fit_cache(MODEL, params, replace(policy, calibration=str(tmp_path / "old")))


def test_damaged_files_are_refused(calibrated, tmp_path):
    data = Path(calibrated[1]).read_bytes()
    for number, broken in enumerate(
        (b"", data[:20], data[:-8], b"\xff" * 64, data[:8] + b"x" * 99)
    ):
        path = tmp_path / str(number)
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is not a calibration, or damaged"):
            read(path)


def test_bytes_that_belong_to_no_array_are_refused(calibrated, tmp_path):
    data = Path(calibrated[1]).read_bytes()
    (tmp_path / "longer").write_bytes(data + b"zz")
    with pytest.raises(ValueError, match=r"longer is not a calibration, or damaged \(its arrays"):
        read(tmp_path / "longer")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(calibrated, tmp_path, bad):
    arrays, metadata = read(calibrated[1])
    name = "k.scale.3.0.05"
    arrays[name] = np.where(np.arange(arrays[name].shape[-1]) == 2, np.float32(bad), arrays[name])
    calibration.save(tmp_path / "bad", calibration.Artefact(arrays, metadata))
    with pytest.raises(ValueError, match=rf"{name} holds numbers that are not finite.*make it"):
        read(tmp_path / "bad")


@pytest.mark.parametrize("name", ["fingerprint", "bits", "outliers", "rope"])
def test_missing_metadata_is_named(calibrated, tmp_path, name):
    params, path = calibrated
    arrays, metadata = read(path)
    del metadata[name]
    calibration.save(tmp_path / "less", calibration.Artefact(arrays, metadata))
    policy = KVQuant(bits=3, outliers=0.05, calibration=str(tmp_path / "less"))
    with pytest.raises(ValueError, match=rf"less'.*does not name its {name}; make one with"):
        fit_cache(MODEL, params, policy)


@pytest.mark.parametrize("name", ["k.scale", "k.offset", "k.table", "v.table", "v.q_norm"])
def test_missing_or_misshapen_arrays_are_named(calibrated, tmp_path, name):
    params, path = calibrated
    arrays, metadata = read(path)
    name += ".3.0.05"
    policy = KVQuant(bits=3, outliers=0.05, q_norm=True, calibration=str(tmp_path / "file"))
    shorter, found = {**arrays, name: arrays[name][..., :1]}, {**arrays}
    del found[name]
    for broken, state in ((found, "missing"), (shorter, "of shape")):
        calibration.save(tmp_path / "file", calibration.Artefact(broken, metadata))
        with pytest.raises(ValueError, match=rf"file'.*{name} is {state}.*make one with"):
            fit_cache(MODEL, params, policy)


def test_scales_of_zero_are_refused(calibrated, tmp_path):
    params, path = calibrated
    arrays, metadata = read(path)
    arrays["k.scale.3.0.05"] = 0 * arrays["k.scale.3.0.05"]
    calibration.save(tmp_path / "zero", calibration.Artefact(arrays, metadata))
    policy = KVQuant(bits=3, outliers=0.05, calibration=str(tmp_path / "zero"))
    with pytest.raises(ValueError, match="scales of layer 0 are not positive; make one with"):
        fit_cache(MODEL, params, policy)


@pytest.mark.parametrize("changed", ["attn/k/kernel", "attn/v/kernel", "mlp_norm", "embed"])
def test_a_calibration_of_other_weights_is_refused(calibrated, changed):
    params, path = calibrated

    def change(keys, leaf):
        at = jax.tree_util.keystr(keys, simple=True, separator="/")
        return 2 * leaf if changed in at else leaf

    other = jax.tree_util.tree_map_with_path(change, params)
    with pytest.raises(ValueError, match="belongs to the model"):
        fit_cache(MODEL, other, KVQuant(bits=3, outliers=0.05, calibration=path))


def test_parameters_without_a_calibration_are_refused(calibrated):
    params, path = calibrated
    policy = KVQuant(bits=3, outliers=0.05, calibration=path)
    caches = MODEL.init_caches(policy, batch=1, capacity=8, max_new=1)
    with pytest.raises(ValueError, match="fit_cache"):
        jax.eval_shape(lambda: MODEL.forward(params, jnp.zeros((1, 1), jnp.int32), caches=caches))
