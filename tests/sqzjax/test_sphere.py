# SPDX-License-Identifier: Apache-2.0
"""Spherical harmonics against scipy, dinosaur, polynomials, brute force and themselves."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.sphere import (
    AnalysisTables,
    Grid,
    Transform,
    cross_spectrum,
    forward,
    inverse,
    max_degree,
    power_spectrum,
)
from sqzjax.sphere.legendre import legendre, quadrature
from tests.tolerances import FLOAT64_REL, SPHERE

special = pytest.importorskip("scipy.special")

GRIDS = [
    Grid(latitudes=17, longitudes=32, layout="equiangular"),
    Grid(latitudes=16, longitudes=32, layout="equiangular"),
    Grid(latitudes=16, longitudes=32, layout="no_south_pole"),
    Grid(latitudes=15, longitudes=36, layout="no_south_pole"),
    Grid(latitudes=16, longitudes=32, layout="cells"),
    Grid(latitudes=15, longitudes=31, layout="cells"),
    Grid(latitudes=16, longitudes=32, layout="gauss", west=-170.0),
    Grid(latitudes=12, longitudes=64, layout="gauss"),
]
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.layout}-{g.latitudes}")
apply_forward = jax.jit(forward, static_argnums=1)
apply_inverse = jax.jit(inverse, static_argnums=1)


def random_coefficients(degree: int, lead: tuple[int, ...] = (), seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    shape = (*lead, degree + 1, degree + 1)
    made = np.tril(rng.normal(size=shape) + 1j * rng.normal(size=shape))
    made[..., 0] = made[..., 0].real
    return jnp.asarray(made, jnp.complex64)


def scipy_field(coefficients: Any, grid: Grid) -> np.ndarray:
    """Sum harmonics one by one, in float64."""
    colatitude = np.radians(90.0 - grid.latitude())[:, None]
    longitude = np.radians(grid.longitude())[None]
    coefficients, field = np.asarray(coefficients), np.zeros(grid.shape)
    for l, m in zip(*np.tril_indices(len(coefficients))):  # noqa: E741
        harmonic = special.sph_harm_y(l, m, colatitude, longitude)
        field += (2.0 if m else 1.0) * (coefficients[l, m] * harmonic).real
    return field


@grids
def test_coefficients_of_a_field_summed_by_scipy_are_found(grid):
    transform = Transform(grid)
    wanted = random_coefficients(transform.degree)
    field = jnp.asarray(scipy_field(wanted, grid), jnp.float32)
    np.testing.assert_allclose(apply_forward(field, transform), wanted, atol=SPHERE)
    np.testing.assert_allclose(
        apply_inverse(wanted, transform) / np.abs(field).max(),
        field / np.abs(field).max(),
        atol=SPHERE,
    )


@grids
@pytest.mark.parametrize("truncation", [None, 0, 5])
def test_a_round_trip_gives_back_every_coefficient(grid, truncation):
    transform = Transform(grid, truncation)
    wanted = random_coefficients(transform.degree, (2, 3))
    found = apply_forward(apply_inverse(wanted, transform), transform)
    np.testing.assert_allclose(found, wanted, atol=SPHERE)


def test_a_round_trip_over_several_blocks_of_orders():
    transform = Transform(Grid(latitudes=80, longitudes=160, layout="no_south_pole"))
    assert transform.degree == 78
    wanted = random_coefficients(78)
    tables = transform.analysis_tables()
    assert [table.shape[:2] for table in tables.blocks] == [(64, 79), (15, 15)]
    assert tuple(table.shape for table in tables.blocks) == transform.table_shapes
    given = apply_forward(apply_inverse(wanted, transform), transform, tables)
    np.testing.assert_allclose(given, wanted, atol=SPHERE)


def test_tables_of_another_kind_or_transform_are_refused():
    transform = Transform(Grid(latitudes=8, longitudes=16, layout="gauss"))
    analysis, synthesis = transform.analysis_tables(), transform.synthesis_tables()
    wanted = random_coefficients(transform.degree)
    field = inverse(wanted, transform, synthesis)
    np.testing.assert_allclose(forward(field, transform, analysis), wanted, atol=SPHERE)
    with pytest.raises(ValueError, match="must be AnalysisTables"):
        forward(field, transform, synthesis)
    with pytest.raises(ValueError, match="must be SynthesisTables"):
        inverse(wanted, transform, analysis)
    other = Transform(transform.grid, 3)
    with pytest.raises(ValueError, match="of another transform"):
        forward(field, transform, other.analysis_tables())
    with pytest.raises(ValueError, match="of another transform"):
        forward(field, transform, AnalysisTables(()))


@grids
def test_parseval_against_an_integral_over_finer_nodes(grid):
    transform = Transform(grid)
    coefficients = random_coefficients(transform.degree)
    field = apply_inverse(coefficients, transform)
    fine = Grid(latitudes=40, longitudes=80, layout="gauss")
    dense = scipy_field(coefficients, fine)
    nodes = np.polynomial.legendre.leggauss(40)[1][::-1]
    integral = 2 * np.pi * (nodes @ np.square(dense).mean(1))
    power = power_spectrum(apply_forward(field, transform)).sum()
    np.testing.assert_allclose(power, integral, rtol=SPHERE)


@grids
def test_quadrature_is_exact_for_as_many_degrees_as_there_are_rows(grid):
    weights, x = quadrature(grid), np.sin(np.radians(grid.latitude()))
    powers = np.arange(2 * grid.latitudes if grid.layout == "gauss" else grid.latitudes)
    wanted = (1.0 - (-1.0) ** (powers + 1)) / (powers + 1)
    np.testing.assert_allclose(weights @ x[:, None] ** powers, wanted, atol=FLOAT64_REL)


def test_functions_of_high_degree_are_orthonormal_and_agree_with_scipy():
    nodes, weights = np.polynomial.legendre.leggauss(760)
    latitude, orders = np.degrees(np.arcsin(nodes)), range(442, 444)
    table = legendre(latitude, 750, orders)
    for functions, order in zip(table, orders):
        own = functions[order:]
        product = 2 * np.pi * (own * weights) @ own.T
        np.testing.assert_allclose(product, np.eye(len(own)), atol=SPHERE)
        assert not functions[:order].any()
    colatitude = np.arccos(nodes[::19])
    for degree in (443, 540, 620):  # scipy overflows beyond
        wanted = special.sph_harm_y(degree, 443, colatitude, 0.0).real
        np.testing.assert_allclose(table[1, degree, ::19], wanted, atol=SPHERE)


def test_gauss_grids_agree_with_dinosaur_on_any_field():
    pytest.importorskip("dinosaur")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dinosaur import spherical_harmonic

        peer = spherical_harmonic.Grid.T21()
        field = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
        theirs = np.asarray(peer.to_modal(field[::-1].T))  # real pairs (cos, sin), south first
    transform = Transform(Grid(latitudes=32, longitudes=64, layout="gauss"), 21)
    ours = np.asarray(apply_forward(field, transform))
    np.testing.assert_allclose(ours[:, 0].real, theirs[0, :22], atol=SPHERE)
    np.testing.assert_allclose(ours[:, 1:].real.T, theirs[1::2, :22] / np.sqrt(2), atol=SPHERE)
    np.testing.assert_allclose(ours[:, 1:].imag.T, -theirs[2::2, :22] / np.sqrt(2), atol=SPHERE)


def test_spectra_are_sums_over_positive_and_negative_orders():
    x, y = random_coefficients(6, seed=1), random_coefficients(6, seed=2)
    cross, alone = (np.asarray(part) for part in (cross_spectrum(x, y), power_spectrum(x)))
    x, y = np.asarray(x), np.asarray(y)
    for l in range(7):  # noqa: E741
        both = sum((x[l, abs(m)] * y[l, abs(m)].conj()).real for m in range(-l, l + 1))
        np.testing.assert_allclose(cross[l], both, rtol=SPHERE)
        power = sum(abs(x[l, abs(m)]) ** 2 for m in range(-l, l + 1))
        np.testing.assert_allclose(alone[l], power, rtol=SPHERE)


def test_turning_the_sphere_leaves_the_spectrum():
    grid = Grid(latitudes=16, longitudes=32, layout="cells")
    transform = Transform(grid)
    field = apply_inverse(random_coefficients(transform.degree), transform)
    turned = jnp.roll(field, 5, axis=-1)[::-1]
    spectra = [power_spectrum(apply_forward(f, transform)) for f in (field, turned)]
    np.testing.assert_allclose(*spectra, rtol=SPHERE)


def test_transforms_map_over_batches_and_differentiate():
    transform = Transform(Grid(latitudes=6, longitudes=12, layout="no_south_pole"))
    fields = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 12)), jnp.float32)
    mapped = jax.jit(jax.vmap(lambda field: forward(field, transform)))(fields)
    np.testing.assert_allclose(mapped, apply_forward(fields, transform), atol=SPHERE)

    def energy(field):
        return power_spectrum(forward(field, transform)).sum()

    slope = jax.jit(jax.grad(energy))(fields[0])
    # The energy is a quadratic form: its slope along any field is twice the cross spectrum.
    pair = apply_forward(fields, transform)
    wanted = 2 * cross_spectrum(pair[0], pair[1]).sum()
    np.testing.assert_allclose((slope * fields[1]).sum(), wanted, rtol=SPHERE)


def test_what_a_grid_cannot_resolve_is_refused():
    region = Grid(latitudes=8, longitudes=8, layout="region", north=60.0, spacing=1.0)
    with pytest.raises(ValueError, match="piece of the sphere"):
        Transform(region)
    grid = Grid(latitudes=16, longitudes=32, layout="no_south_pole")
    assert max_degree(grid) == 14
    with pytest.raises(ValueError, match=r"truncation=15 must lie in \[0, 14\]"):
        Transform(grid, 15)
    with pytest.raises(ValueError, match="not on the grid"):
        forward(jnp.zeros((4, 8, 16)), Transform(grid))
    with pytest.raises(ValueError, match="must end in"):
        inverse(jnp.zeros((4, 4), jnp.complex64), Transform(grid))
    with pytest.raises(ValueError, match="degree=2001"):
        legendre(grid.latitude(), 2001, range(1))


@pytest.mark.slow
def test_a_round_trip_on_the_grid_of_era5_at_full_degree():
    """Takes two minutes and 6 GB, nearly all for the tables."""
    transform = Transform(Grid(latitudes=720, longitudes=1440, layout="no_south_pole"))
    assert transform.degree == 718
    wanted = random_coefficients(718)
    field = apply_inverse(wanted, transform, transform.synthesis_tables())
    found = apply_forward(field, transform, transform.analysis_tables())
    np.testing.assert_allclose(found, wanted, atol=SPHERE)
