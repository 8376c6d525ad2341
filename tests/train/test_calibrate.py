# SPDX-License-Identifier: Apache-2.0
"""Calibration: its statistics against their definitions, and the job that makes the file."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import calibration
from sqzjax.artefact import read
from sqzjax.calibration_config import CalibrationSettings
from sqzjax.cli import EXIT_NONFINITE, EXIT_PREEMPTED
from sqzjax.errors import ConfigError
from sqzjax.kvcache import KVQuant
from sqzjax.models import fit_cache, unstack_layers
from sqzjax.quant.kmeans import Histogram, objective
from sqzjax.quant.sensitivity import scaled_keys, scaled_values
from tests.contracts.decoders import tiny_model
from tests.parameters import drawn
from tests.tolerances import BINNED_REL, CHUNKED, GRADIENT_REL, LOSS_REL
from tests.train import toy
from train import calibrate as job
from train import data
from train.calibrate_config import CalibrateConfig
from train.model_source import Custom

MODEL = tiny_model(qkv_bias=True)
SETTINGS = CalibrationSettings(
    bits=(2, 3), outliers=(0.0, 0.1), bins=1024, range_bins=512, ranges="percentile"
)
LENGTH = 12


def _params():
    params = drawn(MODEL, 1, scale=1.7)
    layers = [f"layers_{i}" for i in range(MODEL.config.num_layers)]
    bias = {"bias": jnp.asarray(np.linspace(-1, 1, 16, dtype=np.float32))}
    return {
        **params,
        **{n: {**params[n], "attn": {**params[n]["attn"], "k": {
            **params[n]["attn"]["k"], **bias}}} for n in layers},
    }  # fmt: skip


def _samples(count=3):
    rng = np.random.default_rng(0)
    return [{"tokens": rng.integers(0, 50, (1, LENGTH)).astype(np.int32)} for _ in range(count)]


def _packed(sample):
    """The row as two documents and a padding token."""
    segments = np.array([[0] * 5 + [1] * (LENGTH - 6) + [-1]], np.int32)
    positions = np.array([[*range(5), *range(LENGTH - 6), -1]], np.int32)
    mask = np.ones((1, LENGTH), bool)
    mask[0, 3] = False
    return {**sample, "segment_ids": segments, "positions": positions, "loss_mask": mask}


def _loss(params, sample, probes=None):
    """Mean next-token loss by definition, from the model's logits."""
    variables = {"params": params} | ({} if probes is None else {"probes": probes})
    rest = {n: jnp.asarray(sample[n]) for n in ("positions", "segment_ids") if n in sample}
    logits = MODEL.apply(variables, jnp.asarray(sample["tokens"]), **rest).logits
    logprobs = jax.nn.log_softmax(logits[0])
    losses = []
    segments = sample.get("segment_ids", np.zeros((1, LENGTH)))[0]
    for t in range(LENGTH - 1):
        counted = "loss_mask" not in sample or sample["loss_mask"][0, t + 1]
        if counted and segments[t] == segments[t + 1] >= 0:
            losses.append(-logprobs[t, sample["tokens"][0, t + 1]])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_loss(packed):
    """Of all layers at once, against a finite difference in a random direction."""
    params, sample = _params(), _samples()[0]
    sample = _packed(sample) if packed else sample
    loss, layers = calibration._forward(MODEL, "pre", params, sample, True)
    wanted = jax.jit(lambda params: _loss(params, sample))(params)
    np.testing.assert_allclose(loss, wanted, rtol=LOSS_REL * 10)
    rng, step = np.random.default_rng(1), 1e-2
    probe = jax.jit(lambda probes: _loss(params, sample, probes))
    shape = (1, LENGTH, 2, 8)
    for name, place in (("keys", 2), ("values", 3)):
        way = [rng.normal(size=shape).astype(np.float32) for _ in layers]
        slope = sum(np.sum(w[0] * g[place]) for w, g in zip(way, layers))

        def moved(size, name=name, way=way):
            rest = {"keys": np.zeros(shape, np.float32), "values": np.zeros(shape, np.float32)}
            return probe({
                f"layers_{i}": {"attn": {**rest, name: size * w}} for i, w in enumerate(way)
            })  # fmt: skip

        difference = (float(moved(step)) - float(moved(-step))) / (2 * step)
        assert slope == pytest.approx(difference, rel=50 * GRADIENT_REL)


def test_keys_are_seen_before_rotation_and_after_bias():
    params, sample = _params(), _samples()[0]
    _, layers = calibration._forward(MODEL, "pre", params, sample, False)
    forward = jax.jit(partial(MODEL.forward, return_hidden="all"))
    x = np.asarray(forward(params, sample["tokens"]).hidden[0])
    norm, attention = params["layers_0"]["attn_norm"]["scale"], params["layers_0"]["attn"]
    x = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + MODEL.config.norm_eps) * norm
    keys = x @ attention["k"]["kernel"] + attention["k"]["bias"]
    np.testing.assert_allclose(layers[0][0].reshape(LENGTH, -1), keys[0], atol=CHUNKED["float32"])
    _, rotated = calibration._forward(MODEL, "post", params, sample, False)
    sizes = [np.linalg.norm(np.asarray(side[0][0]), axis=-1) for side in (layers, rotated)]
    np.testing.assert_allclose(*sizes, rtol=1e3 * LOSS_REL)
    np.testing.assert_allclose(rotated[0][0][0], layers[0][0][0], atol=CHUNKED["float32"])
    assert np.abs(rotated[0][0][1:] - layers[0][0][1:]).max() > 0.1


@pytest.fixture(scope="module")
def artefact():
    return calibration.calibrate(MODEL, _params(), _samples(), SETTINGS)


def _seen(sample):
    """Keys, values and their gradients of layer 0 without the first token, `[T, K, H]`."""
    _, layers = calibration._forward(MODEL, "pre", _params(), sample, True)
    return [np.asarray(a, np.float64)[1:] for a in layers[0]]


def test_ranges_are_percentiles_of_keys_without_sinks(artefact):
    keys = np.concatenate([_seen(sample)[0] for sample in _samples()])
    bin_width = np.ptp(keys, axis=0) / SETTINGS.range_bins
    for fraction in (0.0, 0.1):
        low, high = np.quantile(keys, [fraction / 2, 1 - fraction / 2], axis=0)
        scale, offset = (artefact.arrays[f"k.{n}.2.{fraction:g}"][0] for n in ("scale", "offset"))
        assert np.all(np.abs(offset + scale - high) <= bin_width + 1e-5)
        assert np.all(np.abs(offset - scale - low) <= bin_width + 1e-5)


@pytest.mark.parametrize("weighting", ["paper", "released", "none"])
def test_codebooks_minimise_the_weighted_error(weighting):
    """No table, not even one fitted with other weights, has a lower objective (Eq. 7)."""
    settings = replace(SETTINGS, weighting=weighting, outliers=(0.1,))
    found = calibration.calibrate(MODEL, _params(), _samples(), settings).arrays
    scale, offset = (found[f"k.{name}.2.0.1"][0] for name in ("scale", "offset"))
    numbers = {"k": [], "v": []}
    for sample in _samples():
        k, v, *gradients = _seen(sample)
        ends = np.sort(v, axis=-1)
        # One of eight numbers has a slot: the end whose absence leaves the narrower range.
        upper = ends[..., -1] - ends[..., 1] < ends[..., -2] - ends[..., 0]
        low = np.where(upper, ends[..., 1], ends[..., 0])[..., None]
        high = np.where(upper, ends[..., -1], ends[..., -2])[..., None]
        ranges = ((k, scale, offset), (v, (high - low) / 2, (high + low) / 2))
        for name, (x, s, z), gradient in zip("kv", ranges, gradients):
            u = (x - z) / s
            weight = np.ones_like(u) if weighting == "none" else gradient**2
            weight = weight if weighting == "released" else weight * s**2
            inside = np.abs(u) <= 1 + 1e-5
            numbers[name].append((u[inside], weight[inside]))
    others = calibration.calibrate(
        MODEL, _params(), _samples(), replace(settings, weighting="paper")
    ).arrays
    for name, parts in numbers.items():
        u, weight = (np.concatenate(side) for side in zip(*parts))
        table = np.float64(found[f"{name}.table.2.0.1"][0])
        best = objective(u, weight, table)
        rng = np.random.default_rng(2)
        tried = [np.sort(table + 0.02 * rng.normal(size=4)) for _ in range(20)]
        tried.append(np.float64(others[f"{name}.table.2.0.1"][0]))
        assert best <= min(objective(u, weight, one) for one in tried) * (1 + BINNED_REL)


@pytest.mark.parametrize("weighting", ["paper", "none"])
def test_a_fitted_range_loses_least_with_what_it_clips(weighting):
    """Of keys decoded by the definition, with two slots in a head of eight channels."""
    settings = replace(SETTINGS, weighting=weighting, outliers=(0.3,), ranges="fitted")
    seen = [_seen(sample) for sample in _samples()]
    keys, gradients = (np.concatenate([parts[i] for parts in seen]) for i in (0, 2))
    weights = np.ones_like(keys) if weighting == "none" else gradients**2

    def errors(settings):
        fraction = settings.outliers[0]
        arrays = calibration.calibrate(MODEL, _params(), _samples(), settings).arrays
        for bits in settings.bits:
            names = (f"k.{name}.{bits}.{fraction:g}" for name in ("scale", "offset", "table"))
            scale, offset, table = (np.float64(arrays[name][0]) for name in names)
            u = (keys - offset) / scale
            decoded = table[np.abs(np.clip(u, -1, 1)[..., None] - table).argmin(-1)]
            lost = weights * np.square(keys - scale * decoded - offset)
            size = np.abs(u)
            lost[(size > 1 + 1e-6) & (size >= np.sort(size)[..., -2:-1])] = 0
            yield lost.sum()

    tried = [
        list(errors(replace(settings, outliers=(0.3 * share,), ranges="percentile")))
        for share in calibration.SHARES
    ]
    choices = set()
    for found, *others in zip(errors(settings), *tried):
        assert found <= min(others) * (1 + BINNED_REL), (found, others)
        choices.add(int(np.argmin(others)))
    assert choices - {0, len(calibration.SHARES) - 1}, "neither end should always be best here"


def test_paper_weights_do_not_depend_on_the_scale_of_a_channel():
    """Channels scaled by c have gradients scaled by 1/c: the same numbers, the same weights."""
    rng = np.random.default_rng(3)
    k, gk = (rng.normal(size=(20, 2, 8)).astype(np.float32) for _ in range(2))
    factor = rng.uniform(0.1, 10, (2, 8)).astype(np.float32)
    ranges, mask = np.stack([np.full((2, 8), 2.0), np.zeros((2, 8))]), np.ones(20, bool)
    u, weight, _ = scaled_keys("paper", 1, ranges, k, gk, mask)
    u2, weight2, _ = scaled_keys("paper", 1, ranges * factor, k * factor, gk / factor, mask)
    np.testing.assert_allclose(u, u2, rtol=1e-5)
    np.testing.assert_allclose(weight, weight2, rtol=1e-5)
    _, released, _ = scaled_keys("released", 1, ranges, k, gk, mask)
    np.testing.assert_allclose(4 * released, weight, rtol=1e-5)


def test_what_must_not_count_does_not():
    """Tokens before `sinks` and padding change nothing, outliers weigh nothing."""
    rng = np.random.default_rng(4)
    k, v, gk, gv = (rng.normal(size=(6, 2, 8)).astype(np.float32) for _ in range(4))
    ranges = np.stack([np.full((2, 8), 0.5), np.zeros((2, 8))]).astype(np.float32)
    mask = calibration._counted(_packed(_samples()[0]), 2)
    np.testing.assert_array_equal(mask, [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0])
    kept = np.array([False, True, True, True, True, False])
    u, weight, _ = scaled_keys("paper", 1, ranges, k, gk, kept)
    values, value_weight = scaled_values("paper", 1, v, gv, kept)
    weight = np.asarray(weight)
    assert not np.any(weight[np.abs(u) > 1.001]) and not np.any(weight[[0, 5]])
    assert np.all(np.count_nonzero(np.asarray(value_weight)[1:5], axis=-1) == 7)
    assert np.count_nonzero(np.abs(values) > 1.001) == 12
    histogram = Histogram(1024)
    histogram.add(np.asarray(u), weight)
    assert histogram.sums[2].sum() == np.count_nonzero(weight)


def test_stops_and_goes_on_bit_for_bit(artefact, tmp_path):
    params, samples = _params(), _samples()
    for stop in (2, 3, 5, 8):
        first = calibration.Calibrator(MODEL, params, SETTINGS)
        left = iter([True] * (stop - 1) + [False])
        calibration.run(first, samples.__getitem__, 3, left.__next__)
        calibration.save(tmp_path / "state", first.state())
        second = calibration.Calibrator(MODEL, params, SETTINGS)
        second.restore(calibration.load(tmp_path / "state"))
        assert calibration.run(second, samples.__getitem__, 3)
        for name, array in second.finish().arrays.items():
            np.testing.assert_array_equal(array, artefact.arrays[name], err_msg=name)


def test_a_state_of_another_calibration_is_refused():
    params = _params()
    state = calibration.Calibrator(MODEL, params, SETTINGS).state()
    other = calibration.Calibrator(MODEL, params, replace(SETTINGS, sinks=2))
    with pytest.raises(ValueError, match="has settings"):
        other.restore(state)
    scaled = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    with pytest.raises(ValueError, match="has fingerprint"):
        calibration.Calibrator(MODEL, scaled, SETTINGS).restore(state)


def test_numbers_that_are_not_finite_are_named():
    params = _params()
    kernel = params["layers_1"]["attn"]["v"]["kernel"].at[0, 0].set(jnp.nan)
    attention = {**params["layers_1"]["attn"], "v": {"kernel": kernel, "bias": jnp.zeros(16)}}
    params = {**params, "layers_1": {**params["layers_1"], "attn": attention}}
    with pytest.raises(ValueError, match=r"sample 0: .* not finite in layer 1"):
        calibration.calibrate(MODEL, params, _samples(), SETTINGS)


def test_a_sample_of_several_rows_is_refused():
    """Only its first row would be used."""
    rows = {"tokens": np.ones((2, LENGTH), np.int32)}
    with pytest.raises(ValueError, match=rf"of shape \[2, {LENGTH}\] and must be \[1, T\]"):
        calibration.calibrate(MODEL, _params(), [rows], SETTINGS)


def test_samples_without_a_token_that_counts_are_left_out():
    """One of a sink alone, one of padding alone: as if they were not there."""
    padded = _packed(_samples()[0])
    padded["segment_ids"] = np.full_like(padded["segment_ids"], -1)
    padded["positions"] = np.full_like(padded["positions"], -1)
    alone = {"tokens": np.array([[3]], np.int32)}
    first, *rest = _samples()
    found = calibration.calibrate(MODEL, _params(), [alone, first, padded, *rest], SETTINGS)
    expected = calibration.calibrate(MODEL, _params(), _samples(), SETTINGS)
    assert found.metadata == expected.metadata
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array, err_msg=name)


EMPTY = {
    "no samples": ([], "of 0 samples 0 tokens count"),
    "sinks alone": ([{"tokens": np.array([[3]], np.int32)}] * 2, "of 2 samples 0 tokens count"),
    "padding alone": (
        [{**_samples()[0], "segment_ids": np.full((1, LENGTH), -1, np.int32)}],
        "of 1 samples 0 tokens count",
    ),
    "no successor": (
        [{"tokens": np.array([[3, 4]], np.int32)}],
        "of 1 samples 1 tokens count, 0 of them with a successor",
    ),
    "all masked": (
        [{**_samples()[0], "loss_mask": np.zeros((1, LENGTH), bool)}],
        f"of 1 samples {LENGTH - 1} tokens count, 0 of them with a successor",
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_samples_that_teach_nothing_are_refused_before_gradients(monkeypatch, name):
    samples, message = EMPTY[name]
    monkeypatch.setattr(calibration.Calibrator, "_set_ranges", lambda self: pytest.fail("late"))
    with pytest.raises(ValueError, match=rf"{message}.*sinks=1.*lower sinks"):
        calibration.calibrate(MODEL, _params(), samples, SETTINGS)


def test_without_weights_no_successor_is_needed():
    samples = [{**_samples()[0], "loss_mask": np.zeros((1, LENGTH), bool)}]
    settings = replace(SETTINGS, weighting="none")
    found = calibration.calibrate(MODEL, _params(), samples, settings).arrays
    assert all(np.all(np.isfinite(array)) for array in found.values())


def test_bidirectional_models_are_refused():
    with pytest.raises(ValueError, match="causal"):
        calibration.Calibrator(tiny_model(mask="bidirectional"), _params(), SETTINGS)


@pytest.mark.parametrize(
    "bad",
    [
        {"bits": (5,)},
        {"bits": ()},
        {"outliers": (0.5,)},
        {"sinks": -1},
        {"range_bins": 1},
        {"weighting": "released"},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CalibrationSettings(**bad)


# The job ---------------------------------------------------------------------------------------


def _config(folder, **changes):
    text = toy.write_text(folder)
    base = CalibrateConfig(
        model=Custom(config=toy.MODEL),
        data=data.DataConfig(
            sources=(data.Text(paths=(str(text),), separator="<|end|>"),), eval_fraction=0.0
        ),
        method=SETTINGS,
        samples=2,
        length=16,
        save_every=1,
    )
    return replace(base, **changes)


def test_the_job_writes_a_file_that_fits_its_model(tmp_path):
    config = _config(tmp_path)
    assert job.run(config, workdir=tmp_path / "a") == 0
    path = tmp_path / "a" / job.ARTEFACT
    assert not (tmp_path / "a" / job.PROGRESS).exists()
    metadata = read(path).metadata
    expected = {"kind": "kvquant", "bits": "2,3", "outliers": "0,0.1", "sinks": "1", "samples": "2"}
    assert expected.items() <= metadata.items()
    session = job.prepare(config, tmp_path / "a")
    policy = KVQuant(bits=3, outliers=0.1, calibration=str(path))
    fitted = fit_cache(session.model, session.params, policy)
    cache = unstack_layers(fitted)["layers_1"]["attn"]["cache"]
    assert cache["k"]["scale"].shape == (toy.MODEL.num_kv_heads, 1, toy.MODEL.head_dim)


def test_an_interrupted_job_continues_to_the_same_file(tmp_path, monkeypatch):
    config = _config(tmp_path)
    assert job.run(config, workdir=tmp_path / "whole") == 0

    class Stop(job.Preemption):
        """Asked to stop at every other sample."""

        asked = 0

        @property
        def requested(self):
            Stop.asked += 1
            return Stop.asked % 2 == 0

    monkeypatch.setattr(job, "Preemption", Stop)
    codes = []
    while not codes or codes[-1] == EXIT_PREEMPTED:
        codes.append(job.run(config, workdir=tmp_path / "parts"))
    assert codes[-1] == 0 and len(codes) > 2
    one, other = ((tmp_path / name / job.ARTEFACT).read_bytes() for name in ("whole", "parts"))
    assert one == other


def test_progress_of_other_settings_is_refused_until_discarded(tmp_path, monkeypatch):
    config = _config(tmp_path)
    monkeypatch.setattr(job.Preemption, "requested", True)
    assert job.run(config, workdir=tmp_path / "w") == EXIT_PREEMPTED
    monkeypatch.undo()
    other = replace(config, samples=3)
    left = (tmp_path / "w" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="--resume never"):
        job.run(other, workdir=tmp_path / "w")
    with pytest.raises(ConfigError, match="no steps"):
        job.run(other, workdir=tmp_path / "w", resume="3")
    assert (tmp_path / "w" / "config.yaml").read_bytes() == left
    assert job.run(other, workdir=tmp_path / "w", resume="never") == 0


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    assert job.run(_config(tmp_path), workdir=tmp_path / "w", dry_run=True) == 0
    printed = capsys.readouterr().out
    assert "kind: calibrate" in printed and "sample bytes" in printed
    assert not (tmp_path / "w").exists()


def test_a_loss_that_is_not_finite_has_its_exit_code(tmp_path, monkeypatch):
    load = job.Language.load
    monkeypatch.setattr(
        job.Language, "load", lambda *a: jax.tree.map(lambda leaf: leaf * jnp.nan, load(*a))
    )
    assert job.run(_config(tmp_path), workdir=tmp_path / "w") == EXIT_NONFINITE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 4096}, "max_positions"),
        ({"model": Custom(config=replace(toy.MODEL, mask="bidirectional"))}, "causal"),
        ({"model": Custom(config=replace(toy.MODEL, vocab_size=99, embedding_size=99))}, "vocab"),
    ],
)
def test_bad_models_are_config_errors(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        job.run(_config(tmp_path, **changes), workdir=tmp_path / "w")
