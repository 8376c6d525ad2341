# SPDX-License-Identifier: Apache-2.0
"""The parametric law and the envelope: planted laws, gradients, refusals, invariances, coverage."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binomtest

from sqzjax.analysis.batched_bfgs import minimise
from sqzjax.analysis.scaling_bootstrap import interval
from sqzjax.analysis.scaling_envelope import Curve, _smoothed, envelope
from sqzjax.analysis.scaling_parametric import (
    DELTA,
    ParametricLaw,
    fit_parametric,
    objective,
    optima_of,
    refit_resampled,
)
from tests import tolerances

REANALYSIS = ParametricLaw(E=1.8172, A=477.8, B=2143.0, alpha=0.3473, beta=0.3672)


def planted_runs(generator, law, *, count=60, noise=0.01):
    size = np.exp(generator.uniform(np.log(4e7), np.log(1.5e10), count))
    data = np.exp(generator.uniform(np.log(1e9), np.log(3e11), count))
    return size, data, law(size, data) * np.exp(noise * generator.standard_normal(count))


def test_bfgs_in_a_batch_finds_minima_of_different_functions():
    generator = np.random.default_rng(0)
    targets = generator.normal(size=(50, 2))

    def rosenbrock(points, rows):
        x, y = (points - targets[rows]).T
        value = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        slope = np.stack([2 * (x - 1) - 400 * x * (y - x**2), 200 * (y - x**2)], 1)
        return value, slope

    found = minimise(rosenbrock, generator.normal(size=(50, 2)), iterations=500, tolerance=1e-9)
    assert found.points == pytest.approx(targets + 1, abs=tolerances.NORMAL_EQUATIONS)


def test_the_gradient_of_the_objective_is_its_derivative():
    generator = np.random.default_rng(0)
    size, data, loss = planted_runs(generator, REANALYSIS)
    logs = [np.log(one) for one in (size, data, loss)]
    point = np.array([np.log(400), np.log(2000), 0.6, 0.34, 0.37])
    counts = generator.integers(0, 3, (1, 60)).astype(float)
    value, gradient = objective(point[None], *logs, counts, delta=0.05)
    residual = np.log(ParametricLaw(np.exp(0.6), 400, 2000, 0.34, 0.37)(size, data)) - logs[2]
    huber = np.where(abs(residual) < 0.05, residual**2 / 2, 0.05 * (abs(residual) - 0.025))
    assert value[0] == pytest.approx((huber * counts[0]).sum(), rel=tolerances.FLOAT64_REL)
    for index in range(5):
        step = np.zeros(5)
        step[index] = 1e-6
        ends = [objective((point + s * step)[None], *logs, counts, delta=0.05)[0] for s in (1, -1)]
        numeric = (ends[0] - ends[1]) / 2e-6
        assert gradient[0, index] == pytest.approx(numeric[0], rel=tolerances.FINITE_DIFFERENCE)


@pytest.fixture(scope="module")
def chinchilla():
    """240 runs like those of the re-analysis, and their fit."""
    runs = planted_runs(np.random.default_rng(0), REANALYSIS, count=240, noise=0.006)
    return runs, fit_parametric(*runs)


def test_the_parametric_fit_beats_the_planted_constants(chinchilla):
    (size, data, loss), fit = chinchilla
    logs = [np.log(one) for one in (size, data, loss)]
    law = REANALYSIS
    truth = [np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta]
    assert fit.objective <= objective(np.array([truth]), *logs)[0][0]
    assert fit.converged and fit.gradient < 1e-6 and fit.starts == 4500 and fit.agreeing > 10
    mine = np.array([np.log(fit.law.A), np.log(fit.law.B), np.log(fit.law.E), *fit.law[3:]])
    again = minimize(
        lambda theta: objective(theta[None], *logs)[0][0] / DELTA,
        mine,
        method="Nelder-Mead",
        options={"xatol": 1e-10, "fatol": 1e-13, "maxfev": 4000},
    )
    assert fit.objective <= again.fun * DELTA * (1 + tolerances.NORMAL_EQUATIONS)


def test_the_mean_with_default_tolerances_stops_next_to_its_start(chinchilla):
    (size, data, loss), fit = chinchilla
    logs = [np.log(one) for one in (size, data, loss)]
    start = np.array([np.log(406.4), np.log(410.7), np.log(1.69), 0.34, 0.28])

    def mean(theta):
        value, gradient = objective(theta[None], *logs)
        return value[0] / len(loss), gradient[0] / len(loss)

    trapped = minimize(mean, start, jac=True, method="L-BFGS-B")
    assert trapped.success
    assert abs(trapped.x - start).max() < 0.05 and trapped.fun * len(loss) > 1.2 * fit.objective


def test_a_planted_law_lies_within_its_interval(chinchilla):
    runs, fit = chinchilla
    laws = refit_resampled(fit, *runs, resamples=200)
    assert not np.isnan(laws).any()
    low, high = interval(laws, 0.99)
    truth = np.array(REANALYSIS)
    assert (low < truth).all() and (truth < high).all()
    size, data, loss = optima_of(laws, 1e23)
    for values, true in zip((size, data), REANALYSIS.optimum(1e23)):
        low, high = interval(values, 0.99)
        assert low < true < high
    low, high = interval(loss, 0.99)
    assert low < REANALYSIS(*REANALYSIS.optimum(1e23)) < high


def test_the_best_size_minimises_the_law_at_fixed_compute():
    compute, law = 6e21, REANALYSIS
    size, data = law.optimum(compute)
    assert 6 * size * data == pytest.approx(compute, rel=tolerances.FLOAT64_REL)
    grid = size * np.geomspace(0.5, 2, 2001)
    best = grid[law(grid, compute / 6 / grid).argmin()]
    assert best == pytest.approx(size, rel=1 / 1000)
    assert law.size_exponent == pytest.approx(0.514, rel=tolerances.THREE_DIGITS)


def test_laws_without_a_best_size_have_none():
    flat = REANALYSIS._replace(alpha=-0.1)
    with pytest.raises(ValueError, match=r"alpha=-0\.1 .* must be > 0"):
        flat.optimum(1e20)
    rows = np.array([flat, REANALYSIS, [np.nan] * 5])
    for found, true in zip(optima_of(rows, 1e20), REANALYSIS.optimum(1e20)):
        assert found[1] == true and np.isnan(found[[0, 2]]).all()


def test_parametric_fits_do_not_depend_on_units_or_order():
    generator = np.random.default_rng(5)
    law = ParametricLaw(E=0.005, A=40.0, B=3e3, alpha=0.5, beta=0.5)
    size, data, loss = planted_runs(generator, law, count=30)
    order = generator.permutation(30)
    plain = fit_parametric(size, data, loss)
    moved = fit_parametric(1e-3 * size[order], 1e-4 * data[order], 100 * loss[order])
    assert moved.law[3:] == pytest.approx(plain.law[3:], rel=tolerances.NORMAL_EQUATIONS)
    floor = moved.law.E / 100
    assert floor == pytest.approx(plain.law.E, rel=tolerances.NORMAL_EQUATIONS)


@pytest.mark.slow
def test_parametric_intervals_cover_the_truth():
    generator = np.random.default_rng(0)
    hits = np.zeros(3, int)
    for seed in range(60):
        runs = planted_runs(generator, REANALYSIS, count=100, noise=0.006)
        fit = fit_parametric(*runs)
        low, high = interval(refit_resampled(fit, *runs, resamples=300, seed=seed))
        truth = np.array(REANALYSIS)
        hits += ((low < truth) & (truth < high))[[0, 3, 4]]
    for count in hits:
        assert binomtest(int(count), 60, 0.95).pvalue > tolerances.SAMPLING_P_VALUE


def test_the_envelope_of_planted_curves_follows_the_closed_form():
    law = ParametricLaw(E=1.7, A=400.0, B=400.0, alpha=0.34, beta=0.34)
    curves = []
    for size in np.geomspace(1e7, 1e10, 60):
        data = np.geomspace(1e8, 1e12, 200)
        curves.append(Curve(size, 6 * size * data, law(size, data), data))
    found = envelope(curves)
    assert found.size_law.exponent == pytest.approx(0.5, rel=tolerances.TWO_DIGITS)
    assert found.data_law.exponent == pytest.approx(0.5, rel=tolerances.TWO_DIGITS)
    middle = float(np.sqrt(found.compute[0] * found.compute[-1]))
    assert found.size_law(middle) == pytest.approx(
        law.optimum(middle)[0], rel=tolerances.ENVELOPE_STEPS
    )
    assert min(found.winners) > 1e7 and max(found.winners) < 1e10


def test_smoothing_takes_noise_out_of_curves():
    """Noise makes the envelope hop between sizes, to whichever has drawn the lowest loss."""
    generator = np.random.default_rng(0)
    law = ParametricLaw(E=1.7, A=400.0, B=400.0, alpha=0.34, beta=0.34)
    curves, clean = [], []
    for size in np.geomspace(1e7, 1e9, 7):
        data = np.geomspace(1e6, 1e11, 400)
        noisy = law(size, data) * np.exp(0.01 * generator.normal(size=400))
        curves.append(Curve(size, 6 * size * data, noisy))
        clean.append(Curve(size, 6 * size * data, law(size, data)))
    truth = envelope(clean).size_law.exponent
    rough, smooth, flat = (envelope(curves, smooth=n).size_law.exponent for n in (1, 21, 201))
    assert abs(smooth - truth) < abs(rough - truth) / 2
    assert abs(flat - truth) > 2 * abs(rough - truth)  # half a curve as a window bends it
    with pytest.raises(ValueError, match="odd"):
        envelope(curves, smooth=2)
    with pytest.raises(ValueError, match=r"4 sizes .* needs 5"):
        envelope(curves[:4])
    with pytest.raises(ValueError, match=r"2 sizes .* needs 3"):
        envelope(curves[:2], interior=False)


def test_smoothing_moves_no_curve():
    """Also where the curve is shorter than the window, and of an even length."""
    for length in (6, 7):
        values = np.linspace(1.0, 2.0, length)
        found = _smoothed(values, 99)
        assert found + found[::-1] == pytest.approx(3.0, rel=tolerances.FLOAT64_REL)
