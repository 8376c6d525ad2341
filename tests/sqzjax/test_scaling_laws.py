# SPDX-License-Identifier: Apache-2.0
"""Scaling-law fits: published constants, planted laws, refusals, invariances, coverage."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares
from scipy.stats import binomtest

from sqzjax.analysis.scaling_bootstrap import (
    akima_optima,
    interval,
    law_samples,
    resampled_optima,
    residual_deviation,
    with_known_optima,
)
from sqzjax.analysis.scaling_envelope import Curve, envelope
from sqzjax.analysis.scaling_laws import (
    check_positive,
    fit_power_law,
    fit_saturating_law,
    isoflop,
    saturating_laws,
    vertices,
)
from sqzjax.analysis.scaling_parametric import (
    fit_parametric,
)
from tests import tolerances

ROOT = Path(__file__).resolve().parents[2]
# The table as printed: millions of parameters and losses rounded to five digits.
PRINTED = {
    6e17: "3.10:.01650 6.90:.01395 15.1:.01365 26.4:.01504 39.0:.01841",
    1e18: "6.90:.01267 15.1:.01212 26.4:.01251 39.0:.01382",
    3e18: "15.1:.00997 26.4:.00987 39.0:.00988 60.5:.01043 86.8:.01164",
    6e18: "15.1:.00922 26.4:.00879 39.0:.00862 60.5:.00879 86.8:.00934 115.1:.00999 153.5:.01057",
    1e19: "15.1:.00889 26.4:.00833 39.0:.00798 60.5:.00794 86.8:.00824 115.1:.00858 153.5:.00894"
    " 203.8:.00932",
    3e19: "39.0:.00710 60.5:.00687 86.8:.00688 115.1:.00679 153.5:.00692 203.8:.00691"
    " 304.5:.00718 456.7:.00854",
    6e19: "86.8:.00640 115.1:.00624 153.5:.00629 203.8:.00618 304.5:.00620 456.7:.00693",
}
OPTIMA = [9.92, 13.53, 25.49, 35.11, 48.36, 95.82, 168.16]
LOSSES = [0.01322, 0.01198, 0.00970, 0.00862, 0.00800, 0.00669, 0.00614]
RASTER = [(6e16, 2.69e6, 0.0283), (1e17, 3.40e6, 0.0238), (3e17, 7.41e6, 0.0163)]


def printed_points():
    rows = [
        (budget, *map(float, point.split(":")))
        for budget, line in PRINTED.items()
        for point in line.split()
    ]
    budgets, sizes, losses = np.array(rows).T
    return budgets, sizes * 1e6, losses


def published_points():
    document = json.loads((ROOT / "eval/data/weather_isoflop.json").read_text())
    names = ("budget", "params", "loss")
    return tuple(np.array([p[name] for p in document["points"]], float) for name in names)


def columns(fit):
    return tuple(
        np.array([getattr(one, name) for one in fit.optima]) for name in ("budget", "size", "loss")
    )


def planted_sweep(generator, *, budgets=6, sizes=6, noise=0.005, size_exponent=0.6, shift=0.0):
    """Runs about exact parabolas with N_opt = 2e-4 C^0.6 and L_opt = 12 C^-0.17."""
    rows = []
    for index in range(budgets):
        compute = 10 ** (16 + index / 2)
        best, loss = 2e-4 * compute**size_exponent, 12 * compute**-0.17
        size = best * np.exp(np.linspace(-1.3, 1.5, sizes) + generator.uniform(-0.3, 0.3) + shift)
        drawn = np.exp(noise * generator.standard_normal(sizes))
        rows += zip([compute] * sizes, size, loss * (1 + 0.08 * np.log(size / best) ** 2) * drawn)
    return tuple(np.array(rows).T)


def test_the_published_points_give_the_published_parabolas():
    budgets, size, loss = columns(isoflop(*published_points()))
    assert size / 1e6 == pytest.approx(OPTIMA, rel=tolerances.FOUR_DIGITS)
    assert loss == pytest.approx(LOSSES, rel=tolerances.THREE_DIGITS)
    size_law, loss_law = fit_power_law(budgets, size), fit_power_law(budgets, loss)
    assert size_law == pytest.approx((2.2252e-4, 0.598), rel=tolerances.FOUR_DIGITS)
    assert loss_law.coefficient == pytest.approx(12.33, rel=tolerances.FOUR_DIGITS)
    assert loss_law.exponent == pytest.approx(-0.168, rel=tolerances.THREE_DIGITS)


def test_parabolas_of_the_logarithm_give_other_constants():
    budgets, size, loss = columns(isoflop(*published_points(), log_loss=True))
    assert fit_power_law(budgets, size).coefficient == pytest.approx(
        2.2644e-4, rel=tolerances.FOUR_DIGITS
    )
    assert fit_power_law(budgets, loss).coefficient == pytest.approx(
        12.83, rel=tolerances.FOUR_DIGITS
    )


def test_the_printed_table_gives_them_within_its_rounding():
    exact, rounded = columns(isoflop(*published_points())), columns(isoflop(*printed_points()))
    for column in (1, 2):
        laws = [fit_power_law(fit[0], fit[column]) for fit in (exact, rounded)]
        assert laws[0].coefficient == pytest.approx(
            laws[1].coefficient, rel=tolerances.ROUNDED_POINTS
        )
        assert laws[0].exponent == pytest.approx(laws[1].exponent, rel=tolerances.THREE_DIGITS)
    generator = np.random.default_rng(0)
    budgets, sizes, losses = printed_points()
    half = np.where(sizes < 1e7, 5e3, 5e4)
    spread = []
    for _ in range(200):
        drawn = sizes + generator.uniform(-half, half)
        fit = isoflop(budgets, drawn, losses + generator.uniform(-5e-6, 5e-6, len(losses)))
        spread.append(fit_power_law(*columns(fit)[:2]))
    low, high = np.min(spread, 0), np.max(spread, 0)
    assert low[0] < 2.2252e-4 < high[0] and low[1] < 0.5982 < high[1]


def test_the_three_lower_budgets_give_the_final_fit_and_its_floor():
    known = np.array(RASTER).T
    budgets, size, loss = np.concatenate([known, columns(isoflop(*published_points()))], 1)
    size_law, loss_law = fit_power_law(budgets, size), fit_power_law(budgets, loss)
    assert size_law.exponent == pytest.approx(0.5840, rel=tolerances.THREE_DIGITS)
    assert loss_law == pytest.approx((105.6, -0.2167), rel=tolerances.TWO_DIGITS)
    law = fit_saturating_law(budgets, loss)
    assert law == pytest.approx((0.00506, 0.00702, 0.418, 1e18), rel=tolerances.THREE_DIGITS)
    assert law(2.27e21) == pytest.approx(0.00533, rel=tolerances.THREE_DIGITS)


def test_a_parabola_agrees_with_polyfit():
    generator = np.random.default_rng(3)
    sizes, losses = np.exp(generator.normal(16, 1, 7)), generator.uniform(1, 2, (5, 7))
    found = vertices(sizes, losses)
    for row, coefficients in zip(losses, found.coefficients):
        expected = np.polyfit(np.log(sizes), row, 2)
        assert coefficients == pytest.approx(expected, rel=tolerances.NORMAL_EQUATIONS)


def test_counts_weight_runs_as_repeats_do():
    _, sizes, losses = planted_sweep(np.random.default_rng(0), budgets=1)
    counts = np.array([[2.0, 1, 0, 3, 1, 1]])
    repeated = np.repeat(np.arange(6), counts[0].astype(int))
    weighted = vertices(sizes, losses[None], counts)
    plain = vertices(sizes[repeated], losses[repeated][None])
    assert weighted.size == pytest.approx(plain.size, rel=tolerances.NORMAL_EQUATIONS)
    assert weighted.loss == pytest.approx(plain.loss, rel=tolerances.NORMAL_EQUATIONS)


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([3, 2, 1.0], "lowest loss is that of the smallest or largest"),
        ([1, 2, 3, 4.0], "lowest loss is that of the smallest or largest"),
        ([2, 1.0], "fewer than 3 sizes"),
        ([2, 3, 1.9, 3, 2.2], "no minimum"),
        ([2, 1.1, 1.12, 1.09, 1.1], "outside the sizes"),
        ([9, 0.2, 0.1, 0.2, 9], "falls below zero"),
        ([1, 2, 1.0], "lowest loss is that of the smallest or largest"),
        ([2, 1, 1.5, 1.0], "lowest loss is that of the smallest or largest"),
    ],
)
def test_a_budget_without_a_trustworthy_minimum_is_refused(losses, reason):
    good, sizes, values = planted_sweep(np.random.default_rng(0), budgets=2, noise=0.0)
    if reason == "outside the sizes":  # steep fall: the vertex lies beyond a nearly flat end
        losses = [5, 3.0, 1.8, 1.0, 1.05]
        own = np.geomspace(1e6, 1.5e6, 5)
        own[-1] = own[-2] * 1.0001
    else:
        own = np.geomspace(1e6, 1e8, len(losses))
    fit = isoflop(
        np.concatenate([good, [1e20] * len(losses)]),
        np.concatenate([sizes, own]),
        np.concatenate([values, np.array(losses, float)]),
    )
    assert len(fit.optima) == 2
    assert [one.budget for one in fit.refusals] == [1e20] and reason in fit.refusals[0].reason


def test_resamples_below_zero_are_refused_too():
    points = planted_sweep(np.random.default_rng(0), budgets=2, noise=0.0)
    fit = isoflop(*points)
    budgets, sizes, _ = points
    steep = np.where(np.arange(12) % 6 % 5 == 0, 9.0, 0.1)  # 9 at both ends of each budget
    steep[[2, 8]] = 0.05
    samples = resampled_optima(fit, budgets, sizes, steep, scheme="runs", resamples=50)
    assert not (samples.loss <= 0).any() and samples.refused().mean() > 0.5


def test_repeats_of_a_size_are_no_further_sizes():
    found = vertices(np.array([1e6, 1e6, 2e6, 2e6]), np.array([[2.0, 2.1, 1.0, 1.1]]))
    assert found.reason[0] == 1


def test_a_planted_optimum_at_the_edge_is_rejected():
    points = planted_sweep(np.random.default_rng(0), noise=0.0, shift=2.0)
    with pytest.raises(ValueError, match=r"only 0 of 6 budgets .* add sizes beyond"):
        isoflop(*points)


def test_bad_points_are_named():
    ones = np.ones(3)
    two = np.ones(2)
    with pytest.raises(ValueError, match="losses must be positive and finite, found"):
        isoflop(ones, ones, np.array([1, np.nan, 1]))
    with pytest.raises(ValueError, match="2 sizes"):
        check_positive(budgets=ones, sizes=two, losses=ones)
    with pytest.raises(ValueError, match="three constants"):
        fit_saturating_law(np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="five constants"):
        fit_parametric(ones, ones, ones)
    bad = np.array([1.0, 2.0, np.nan])
    for name, fit in (
        ("data", lambda: fit_parametric(ones, bad, ones)),
        ("data", lambda: isoflop(ones, ones, ones, bad)),
        ("compute", lambda: fit_power_law(-ones, ones)),
        ("values", lambda: fit_power_law(ones, bad)),
        ("values", lambda: fit_saturating_law(ones, bad)),
        ("losses", lambda: envelope([Curve(1.0, ones, bad)] * 5)),
        ("sizes", lambda: envelope([Curve(-1.0, ones, ones)] * 5)),
    ):
        with pytest.raises(ValueError, match=f"{name} must be positive and finite, found"):
            fit()
    with pytest.raises(ValueError, match="3 values at 1 different computes"):
        fit_power_law(ones, ones)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(-8, 8), gain=st.floats(-5, 5))
def test_order_and_units_do_not_matter(seed, scale, gain):
    generator = np.random.default_rng(seed)
    budgets, sizes, losses = planted_sweep(generator)
    order = generator.permutation(len(budgets))
    plain = columns(isoflop(budgets, sizes, losses))
    moved = columns(isoflop(budgets[order], sizes[order] * 10**scale, losses[order] * 10**gain))
    assert moved[0].tolist() == plain[0].tolist()
    assert moved[1] / 10**scale == pytest.approx(plain[1], rel=tolerances.NORMAL_EQUATIONS)
    assert moved[2] / 10**gain == pytest.approx(plain[2], rel=tolerances.NORMAL_EQUATIONS)


@pytest.mark.parametrize(("noise", "exponent"), [(0.02, 0.4), (0.05, 1.0)])
def test_saturating_laws_are_the_least_squares_of_scipy(noise, exponent):
    """Also where the floor lies above the smallest value, as it may with noise."""
    generator = np.random.default_rng(0)
    compute = np.geomspace(6e16, 6e19, 9)
    truth = 0.005 + 0.007 * (compute / 1e18) ** -exponent
    values = truth * np.exp(noise * generator.standard_normal((20, 9)))
    for row, found in zip(values, saturating_laws(compute, values, 1e18)):

        def residuals(point, row=row):
            floor, logarithm, exponent = point
            predicted = floor + np.exp(logarithm - exponent * np.log(compute / 1e18))
            return np.log(predicted / row)

        reference = least_squares(
            residuals,
            [0.004, np.log(0.008), 0.35],
            bounds=([0, -20, -2], [np.inf, 20, 3]),
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
        )
        mine = residuals((found[0], np.log(found[1]), found[2]))
        assert (mine**2).sum() <= 2 * reference.cost * (1 + tolerances.NORMAL_EQUATIONS)


def test_data_that_do_not_level_off_have_no_floor():
    compute = np.geomspace(1e16, 1e20, 6)
    law = fit_saturating_law(compute, 12 * compute**-0.17)
    assert law.floor == pytest.approx(0, abs=tolerances.NORMAL_EQUATIONS)
    assert law.exponent == pytest.approx(0.17, rel=tolerances.NORMAL_EQUATIONS)
    bending = 12 * compute**-0.17 * np.exp(-0.02 * np.log(compute / 1e18) ** 2)
    law = fit_saturating_law(compute, bending)
    assert law.floor == 0 and -law.exponent == pytest.approx(fit_power_law(compute, bending)[1])


def covered(count, *, noise=0.005, sizes=6, resamples=300, factor=1.0, scheme="residuals"):
    """How many of `count` planted sweeps have the true exponents in their 95 % intervals."""
    generator = np.random.default_rng(11)
    hits = np.zeros(2, int)
    for seed in range(count):
        points = planted_sweep(generator, noise=noise, sizes=sizes)
        samples = resampled_optima(
            isoflop(*points), *points, scheme=scheme, resamples=resamples, seed=seed
        )
        laws = law_samples(samples)
        for place, (name, truth) in enumerate((("size", 0.6), ("loss", -0.17))):
            low, high = interval(laws[name][:, 1])
            middle, half = (low + high) / 2, factor * (high - low) / 2
            hits[place] += abs(truth - middle) <= half
    return hits


def test_intervals_cover_the_truth_at_their_rate():
    for hits in covered(80):
        assert binomtest(int(hits), 80, 0.95).pvalue > tolerances.SAMPLING_P_VALUE
    # Intervals of half the width would be found out.
    for hits in covered(80, factor=0.5):
        assert binomtest(int(hits), 80, 0.95).pvalue < tolerances.SAMPLING_P_VALUE


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "sizes"), [(0.003, 4), (0.005, 5), (0.01, 8)])
def test_intervals_cover_the_truth_at_their_rate_for_many_sweeps(noise, sizes):
    for hits in covered(1000, noise=noise, sizes=sizes, resamples=1000):
        assert 0.92 < hits / 1000 < 0.97


@pytest.mark.slow
def test_drawing_runs_is_the_wider_interval():
    assert (covered(300, scheme="runs") >= 0.95 * 300).all()


def test_resampling_is_reproducible_and_tells_what_it_dropped():
    points = published_points()
    fit = isoflop(*points)
    one, same, other = (
        resampled_optima(fit, *points, scheme="runs", resamples=200, seed=seed)
        for seed in (0, 0, 1)
    )
    assert np.array_equal(one.size, same.size, equal_nan=True)
    assert not np.array_equal(one.size, other.size, equal_nan=True)
    assert 0.01 < one.refused().mean() < 0.6
    assert np.isfinite(law_samples(one)["size"]).all()


def test_akima_finds_the_planted_optimum_and_drops_edges():
    generator = np.random.default_rng(2)
    points = planted_sweep(generator, noise=0.0, sizes=9)
    samples = akima_optima(isoflop(*points), *points, noise=0.005, resamples=300)
    low, high = interval(law_samples(samples)["size"][:, 1])
    assert low < 0.6 < high
    flat = akima_optima(isoflop(*points), *points, noise=0.5, resamples=300)
    assert flat.refused().mean() > 0.1 and samples.refused().mean() < 0.05


def test_the_noise_is_estimated_from_what_parabolas_leave():
    generator = np.random.default_rng(4)
    points = planted_sweep(generator, budgets=10, sizes=12, noise=0.01)
    assert residual_deviation(isoflop(*points), *points) == pytest.approx(
        0.01, rel=tolerances.NOISE_ESTIMATE
    )
    points = planted_sweep(generator, sizes=3, noise=0.0)
    with pytest.raises(ValueError, match="no residuals"):
        residual_deviation(isoflop(*points), *points)


def test_known_optima_join_the_samples():
    points = published_points()
    fit = isoflop(*points)
    samples = resampled_optima(fit, *points, resamples=300)
    joined = with_known_optima(samples, RASTER, deviation=0.02)
    assert joined.size.shape == (300, 10)
    assert joined.size[:, :3].std(0) / joined.size[:, :3].mean(0) == pytest.approx(
        0.02, rel=tolerances.NOISE_ESTIMATE
    )
    low, high = interval(law_samples(joined)["size"][:, 1])
    assert low < 0.584 < high
