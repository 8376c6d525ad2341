# SPDX-License-Identifier: Apache-2.0
"""Losses of forecasts against their formulae in float64, and the rollout against a plain loop."""

import itertools
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import forecast_losses as losses
from sqzjax.fields.channel_weights import channel_weights
from sqzjax.sphere import Grid, Transform, forward, inverse, power_spectrum
from tests.sqzjax.test_sphere import random_coefficients, scipy_field
from tests.tolerances import FORECAST_REL, GRADIENT_REL, SPECTRAL_MSE

GRID = Grid(latitudes=12, longitudes=24, layout="no_south_pole")
TRANSFORM = Transform(GRID)
amse = jax.jit(losses.amse, static_argnames=("transform", "mean", "channel_weights", "unresolved"))


def fields(seed: int, lead: tuple[int, ...] = (2, 3)) -> jax.Array:
    return inverse(random_coefficients(TRANSFORM.degree, lead, seed), TRANSFORM)


def test_plain_and_weighted_errors_equal_loops():
    x, y = (np.asarray(fields(seed), np.float64) for seed in (0, 1))
    cosine = np.cos(np.radians(GRID.latitude()))
    weights = (1.0, 2.0, 0.5)
    plain, weighted = np.zeros(2), np.zeros(2)
    for b in range(2):
        for c in range(3):
            for row in range(12):
                error = np.square(x[b, c, row] - y[b, c, row]).mean()
                plain[b] += error / 36
                weighted[b] += error * cosine[row] / cosine.sum() * weights[c] / sum(weights)
    np.testing.assert_allclose(losses.mse(fields(0), fields(1)), plain, rtol=FORECAST_REL)
    found = losses.weighted_mse(fields(0), fields(1), GRID, weights)
    np.testing.assert_allclose(found, weighted, rtol=FORECAST_REL)
    with pytest.raises(ValueError, match="2 numbers, the fields 3 channels"):
        losses.weighted_mse(fields(0), fields(1), GRID, (1.0, 2.0))


def _exact(*coefficients: jax.Array) -> list[np.ndarray]:
    return [np.asarray(c, np.complex128) for c in coefficients]


def reference_amse(x: np.ndarray, y: np.ndarray) -> float:
    """The sheet's formula on coefficients `[l, m]`, in float64."""
    twice = np.where(np.arange(len(x)) > 0, 2.0, 1.0)
    power_x, power_y = (np.sum(twice * np.abs(c) ** 2, -1) for c in (x, y))
    cross = np.sum(twice * (x * y.conj()).real, -1)
    coherence = cross / np.sqrt(power_x * power_y)
    amplitude = (np.sqrt(power_x) - np.sqrt(power_y)) ** 2
    return float(np.sum(amplitude + 2 * np.maximum(power_x, power_y) * (1 - coherence)))


@pytest.mark.parametrize(
    ("scale", "noise"), [*itertools.product([1e-3, 0.5, 1.0, 40.0], [1e-3, 0.1, 3.0]), (0.0, 1e-5)]
)
def test_amse_is_the_published_formula(scale, noise):
    y = random_coefficients(TRANSFORM.degree, (3,), 0)
    x = scale * y + noise * random_coefficients(TRANSFORM.degree, (3,), 1)
    wanted = np.mean([reference_amse(*pair) for pair in zip(*_exact(x, y))])
    found = amse(inverse(x, TRANSFORM), inverse(y, TRANSFORM), TRANSFORM)
    # The difference of nearly equal fields loses digits before it comes here.
    lost = max(1.0, 1e-1 / noise) if scale else 1.0
    np.testing.assert_allclose(found, wanted, rtol=FORECAST_REL * lost)


def test_tables_may_be_arguments_of_the_program():
    x, y = fields(0), fields(1)
    given = jax.jit(partial(losses.amse, transform=TRANSFORM, unresolved=2.0))
    tables = losses.spectral_tables(TRANSFORM, 2.0)
    wanted = amse(x, y, TRANSFORM, unresolved=2.0)
    np.testing.assert_allclose(given(x, y, tables=tables), wanted, rtol=FORECAST_REL)
    texts = [given.lower(x, y, tables=some).as_text() for some in (None, tables)]
    largest = [max(map(len, re.findall(r"dense<[^>]*>", text))) for text in texts]
    assert largest[1] < tables[0].blocks[0].nbytes < largest[0]
    with pytest.raises(ValueError, match=r"mean='geometrical' must be one of"):
        getattr(losses.amse, "__wrapped__", losses.amse)(x, y, TRANSFORM, mean="geometrical")


def test_half_precision_is_squared_in_float32():
    x, y = (fields(seed).astype(jnp.bfloat16) for seed in (0, 1))
    exact = [np.asarray(field, np.float64) for field in (x, y)]
    wanted = np.square(exact[0] - exact[1]).mean((-3, -2, -1))
    found = losses.mse(x, y)
    assert found.dtype == losses.weighted_mse(x, y, GRID).dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=FORECAST_REL)


@pytest.mark.parametrize("factor", [0.01, 0.5, 0.9, 2.0, 10.0])
def test_amse_of_a_scaled_field_is_its_lost_amplitude(factor):
    x = fields(3)
    power = power_spectrum(forward(x, TRANSFORM)).sum(-1).mean(-1)
    found = amse(x, factor * x, TRANSFORM)
    np.testing.assert_allclose(found, (1 - factor) ** 2 * power, rtol=FORECAST_REL)


def test_amse_of_equal_fields_is_zero():
    x = fields(0)
    np.testing.assert_array_equal(amse(x, x, TRANSFORM), np.zeros(2))


def test_the_geometric_mean_gives_the_square_error_over_the_sphere():
    """By Parseval, 4 pi times the mean square over the sphere, integrated on finer nodes."""
    x, y = random_coefficients(TRANSFORM.degree, seed=1), random_coefficients(TRANSFORM.degree)
    fine = Grid(latitudes=32, longitudes=64, layout="gauss")
    nodes = np.polynomial.legendre.leggauss(32)[1][::-1]
    error = np.square(scipy_field(x, fine) - scipy_field(y, fine))
    mean_square = nodes @ error.mean(1) / 2
    pair = [jnp.asarray(scipy_field(c, GRID), jnp.float32)[None] for c in (x, y)]
    found = amse(*pair, TRANSFORM, mean="geometric")
    np.testing.assert_allclose(found, 4 * np.pi * mean_square, rtol=SPECTRAL_MSE)


def test_amse_weighs_channels_and_leaves_degrees_out():
    x, y = fields(0), fields(1)
    each = jnp.stack([amse(x[:, [c]], y[:, [c]], TRANSFORM) for c in range(3)])
    found = amse(x, y, TRANSFORM, channel_weights=(3.0, 2.0, 1.0))
    wanted = (1.5 * each[0] + each[1] + 0.5 * each[2]) / 3
    np.testing.assert_allclose(found, wanted, rtol=FORECAST_REL)
    few = Transform(GRID, 4)
    cut = [inverse(forward(field, few), few) for field in (x, y)]
    np.testing.assert_allclose(amse(x, y, few), amse(*cut, TRANSFORM), rtol=FORECAST_REL)


def test_amse_can_count_what_harmonics_do_not_see():
    y = fields(0)
    noise = jnp.zeros_like(y).at[..., 1, :].set((-1.0) ** jnp.arange(24))  # next to the pole
    seen = amse(y + noise, y, TRANSFORM)
    left = noise - inverse(forward(noise, TRANSFORM), TRANSFORM)
    found = amse(y + noise, y, TRANSFORM, unresolved=2.0)
    wanted = seen + 8 * np.pi * jnp.square(left).mean((-3, -2, -1))
    np.testing.assert_allclose(found, wanted, rtol=FORECAST_REL)
    assert (found > 10 * seen).all()
    same = amse(y, fields(1), TRANSFORM, unresolved=2.0)
    np.testing.assert_allclose(same, amse(y, fields(1), TRANSFORM), rtol=FORECAST_REL)


@partial(jax.jit, static_argnames="mean")
def amse_and_slope(prediction: jax.Array, target: jax.Array, mean: Any = "max") -> Any:
    return jax.value_and_grad(lambda a: losses.amse(a, target, TRANSFORM, mean=mean).sum())(
        prediction
    )


@pytest.mark.parametrize("truth", ["zero", "constant", "smooth", "equal"])
@pytest.mark.parametrize("guess", ["zero", "constant", "field"])
@pytest.mark.parametrize("mean", ["max", "geometric"])
def test_gradients_of_amse_are_finite_where_spectra_vanish(truth, guess, mean):
    empty = jnp.zeros((3, 12, 24))
    x = {"zero": empty, "constant": empty + 1.0, "field": fields(0)[0]}
    known = {"zero": empty, "constant": empty + 2.0}
    few = Transform(GRID, 3)
    known |= {"smooth": inverse(forward(fields(1)[0], few), few), "equal": x[guess]}
    value, slope = amse_and_slope(x[guess], known[truth], mean)
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_the_gradient_of_amse_is_its_slope():
    # High degrees of the guess are weak, as those of a model trained on the mean square.
    damping = np.exp(-np.arange(TRANSFORM.degree + 1) / 3)[:, None].astype(np.float32)
    y = random_coefficients(TRANSFORM.degree, (3,), 5)
    x = y * damping + 0.05 * random_coefficients(TRANSFORM.degree, (3,), 6)
    way = 0.2 * random_coefficients(TRANSFORM.degree, (3,), 7)
    field, towards = inverse(x, TRANSFORM), inverse(way, TRANSFORM)
    target = inverse(y, TRANSFORM)
    slope = (amse_and_slope(field, target)[1] * towards).sum()

    def exact(step: float) -> float:
        (start, goal), (along,) = _exact(x, y), _exact(way)
        return np.mean([reference_amse(*pair) for pair in zip(start + step * along, goal)])

    difference = (exact(1e-5) - exact(-1e-5)) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=GRADIENT_REL)


def test_channels_weigh_what_graphcast_gives_them():
    names = ["2m_temperature", "10m_u_component_of_wind", "surface_pressure", "temperature_50"]
    names += ["geopotential_1000", "t2m", "2t", "t_500"]
    raw = np.array([1.0, 0.1, 0.1, 0.05, 1.0, 1.0, 1.0, 0.5])
    np.testing.assert_allclose(channel_weights(names), raw / raw.mean(), rtol=FORECAST_REL)
    with pytest.raises(ValueError, match="must name every channel"):
        channel_weights([])


@dataclass(frozen=True)
class Linear:
    """Next state = a mean of the context, advected and pushed by the first constant."""

    context: int
    channels: int

    def forward(self, params: Any, fields: jax.Array) -> jax.Array:
        states, constants = fields[:, :, : self.channels], fields[:, -1, self.channels :]
        mixed = jnp.einsum("t,btchw->bchw", params["mix"], states)
        return jnp.tanh(jnp.roll(mixed, 1, axis=-1)) + params["push"] * constants[:, :1]


@pytest.mark.parametrize("steps", [1, 4])
def test_a_rollout_is_a_loop_with_gradients_through_it(steps):
    model = Linear(context=2, channels=3)
    rng = np.random.default_rng(0)
    window = jnp.asarray(rng.normal(size=(2, 2, 3, 4, 8)), jnp.float32)
    constants = jnp.asarray(rng.normal(size=(2, 2, 4, 8)), jnp.float32)
    params = {"mix": jnp.array([-0.5, 1.2]), "push": jnp.float32(0.3)}

    def loop(params):
        states = [window[:, 0], window[:, 1]]
        for _ in range(steps):
            pair = jnp.stack(states[-2:], axis=1)
            both = jnp.repeat(constants[:, None], 2, axis=1)
            states.append(model.forward(params, jnp.concatenate([pair, both], axis=2)))
        return jnp.stack(states[2:])

    def rolled(params):
        return losses.rollout(model, params, window, constants, steps)

    found, wanted = (jax.jit(f)(params) for f in (rolled, loop))
    np.testing.assert_allclose(found, wanted, rtol=FORECAST_REL, atol=FORECAST_REL)
    found, wanted = (
        jax.jit(jax.grad(lambda p, f=f: jnp.square(f(p)).mean()))(params) for f in (rolled, loop)
    )
    for name in params:
        np.testing.assert_allclose(found[name], wanted[name], rtol=GRADIENT_REL)
