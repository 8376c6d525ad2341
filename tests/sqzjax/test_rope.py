# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding against complex rotation and against each scaling's defining property."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.attention import rope
from sqzjax.attention.rope_config import RopeConfig
from tests.tolerances import CHUNKED

WIDTH = 16


def _inverse(**fields):
    return rope.frequencies(RopeConfig(**fields), WIDTH)


def test_rotation_is_complex_multiplication_of_half_split_pairs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, WIDTH)).astype(np.float32)
    positions = rng.integers(0, 1000, (2, 5))
    turned = rope.rotate(
        jnp.asarray(x), *rope.angles(RopeConfig(), WIDTH, jnp.asarray(positions, jnp.int32))
    )
    inverse = 10000.0 ** -(np.arange(0, WIDTH, 2) / WIDTH)
    pairs = x[..., : WIDTH // 2] + 1j * x[..., WIDTH // 2 :]
    pairs = pairs * np.exp(1j * positions[..., None] * inverse)[:, :, None]
    # Angles near 1,000 radians carry 6e-5 of float32 rounding.
    np.testing.assert_allclose(
        turned, np.concatenate([pairs.real, pairs.imag], -1), atol=20 * CHUNKED["float32"]
    )


def test_linear_divides_positions():
    plain, _ = _inverse()
    scaled, factor = _inverse(kind="linear", factor=4.0)
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)
    assert factor == 1.0


def test_llama3_stretches_slow_and_keeps_fast_wavelengths():
    plain, _ = _inverse(theta=5e5)
    scaled, _ = _inverse(theta=5e5, kind="llama3", factor=8.0, original_max_positions=64)
    wavelength = 2 * math.pi / plain
    np.testing.assert_allclose(scaled[wavelength > 64], plain[wavelength > 64] / 8, rtol=1e-6)
    np.testing.assert_allclose(scaled[wavelength < 16], plain[wavelength < 16], rtol=1e-6)
    between = (wavelength > 16) & (wavelength < 64)
    assert between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8))


def test_yarn_interpolates_slow_dimensions_and_scales_attention():
    plain, _ = _inverse()
    scaled, factor = _inverse(kind="yarn", factor=4.0, original_max_positions=64)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    assert scaled[0] == pytest.approx(plain[0]) and scaled[-1] == pytest.approx(plain[-1] / 4)
    assert np.all(scaled <= plain) and np.all(scaled >= plain / 4 * (1 - 1e-6))
    _, chosen = _inverse(kind="yarn", factor=4.0, original_max_positions=64, attention_factor=1.5)
    assert chosen == 1.5
    _, ratio = _inverse(
        kind="yarn", factor=4.0, original_max_positions=64, mscale=1.0, mscale_all_dim=0.5
    )
    assert ratio == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"theta": 0.0}, "theta=0.0"),
        ({"factor": -1.0}, "factor=-1.0"),
        ({"kind": "yarn", "factor": 2.0}, "original_max_positions=0"),
        ({"kind": "yarn", "theta": 1.0, "original_max_positions": 8}, "theta=1.0"),
        (
            {"kind": "llama3", "low_freq_factor": 4.0, "original_max_positions": 8},
            "high_freq_factor=4.0",
        ),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)
