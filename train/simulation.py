# SPDX-License-Identifier: Apache-2.0
"""The simulated atmosphere: how it begins, how it goes on, and what is recorded of it.

Dry primitive equations in spherical harmonics (the package dinosaur-dycore) with the relaxation and
drag of Held and Suarez (1994), over made-up mountains. About 35 ms per state of T31 with 5 layers
on two busy CPU cores. The package is imported when a simulation is built.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.errors import DataError
from sqzjax.typing import Array, Float, Int
from train.simulate_config import SimulateConfig

UNITS = {
    "geopotential": "m**2 s**-2",
    "temperature": "K",
    "u_component_of_wind": "m s**-1",
    "v_component_of_wind": "m s**-1",
    "surface_pressure": "Pa",
    "geopotential_at_surface": "m**2 s**-2",
    "land_sea_mask": "1",
}
_DISSIPATION_ORDER = 4  # of the Laplacian: the 8th power of the wavenumber
_PERTURBATION = 5e3  # Pa; breaks the symmetry of the atmosphere at rest
_REDNESS = 1.7  # amplitude of degree l in the made-up terrain: (l + 1) ** -_REDNESS

State = Any
"""Dinosaur's state: spectral vorticity, divergence, temperature, log surface pressure."""


@dataclass(frozen=True)
class Simulation:
    """`start()` gives a state; `advance` goes on to the next one that is kept and records it."""

    start: Callable[[], State]
    advance: Callable[[State], tuple[State, dict[str, Array]]]
    constants: dict[str, np.ndarray]  # H W, rows from north to south


def load_package() -> Any:
    """Import dinosaur's modules; DataError if it is not installed."""
    try:
        with warnings.catch_warnings():
            # It imports names that jax has moved.
            warnings.simplefilter("ignore", DeprecationWarning)
            import dinosaur
            import dinosaur.held_suarez
            import dinosaur.primitive_equations_states
    except ImportError as error:
        raise DataError(
            f"simulating weather needs dinosaur-dycore: install sqzjax[weather] ({error})"
        ) from error
    return dinosaur


def build(config: SimulateConfig) -> Simulation:
    """Prepare a simulation; equal configurations give equal states on one machine.

    Draws the mountains, computes the first state and the tables of the transforms, a matter of
    seconds; nothing is compiled before `advance` is called. DataError if dinosaur is not there, or
    no land comes out.
    """
    dino = load_package()
    units = dino.scales.units
    coords = _coordinates(dino, config)
    specs = dino.primitive_equations.PrimitiveEquationsSpecs.from_si()
    height, land = terrain(config, coords.horizontal)
    initial, features = dino.primitive_equations_states.isothermal_rest_atmosphere(
        coords,
        specs,
        p0=1e5 * units.pascal,
        p1=_PERTURBATION * units.pascal,
        surface_height=np.asarray(coords.horizontal.to_nodal(height), np.float64) * units.meter,
    )
    reference = features[dino.xarray_utils.REF_TEMP_KEY]
    orography = dino.primitive_equations.truncated_modal_orography(
        features[dino.xarray_utils.OROGRAPHY], coords
    )
    step = _time_step(dino, config, coords, specs, reference, orography)
    start = functools.partial(initial, jax.random.key(config.seed))
    keep_mass = _mass_keeper(coords.horizontal, start())
    recorder = Recorder(config, dino, coords, specs, reference, orography)

    def advance(state: State) -> tuple[State, dict[str, Array]]:
        state = keep_mass(dino.time_integration.repeated(step, config.steps_per_state)(state))
        return state, recorder.record(state)

    surface = recorder.scaled(
        recorder.on_grid(jnp.asarray(orography)) * specs.g, "meter ** 2 / second ** 2"
    )
    return Simulation(
        start=start,
        advance=jax.jit(advance),
        constants={
            "geopotential_at_surface": np.asarray(surface, np.float32),
            "land_sea_mask": np.asarray(recorder.on_grid(jnp.asarray(land)) > 0, np.float32),
        },
    )


def _coordinates(dino: Any, config: SimulateConfig) -> Any:
    """Return a grid on which products of two fields are exact, and the layers."""
    horizontal = dino.spherical_harmonic.Grid(
        longitude_wavenumbers=config.wavenumbers + 1,
        total_wavenumbers=config.wavenumbers + 2,
        longitude_nodes=_even(3 * config.wavenumbers + 1),
        latitude_nodes=_even(3 * config.wavenumbers + 1) // 2,
    )
    vertical = dino.sigma_coordinates.SigmaCoordinates.equidistant(config.layers)
    return dino.coordinate_systems.CoordinateSystem(horizontal, vertical)


def _even(number: int) -> int:
    return number + (-number) % 4


def terrain(config: SimulateConfig, grid: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return spectra of the height in metres and of a field that is positive on land.

    `grid` is dinosaur's; spectra are arrays of its modal shape, and the same for the same seed. Red
    noise; what rises above the quantile that `land_fraction` sets is land, its height cut off
    below. Heights are smoothed, so that no ripples reach over the sea. DataError if the land is
    less than a point of the grid.
    """
    rng = np.random.default_rng(config.seed)
    degree = np.asarray(grid.modal_axes[1], np.float64)
    noise = rng.normal(size=grid.modal_shape) * grid.mask * (degree + 1) ** -_REDNESS
    noise[..., 0] = 0.0
    field = np.asarray(grid.to_nodal(noise), np.float64)
    weights = np.broadcast_to(np.polynomial.legendre.leggauss(grid.latitude_nodes)[1], field.shape)
    order = np.argsort(field, axis=None)
    covered = np.cumsum(weights.ravel()[order]) / weights.sum()
    shore = field.ravel()[order][np.searchsorted(covered, 1 - config.land_fraction)]
    height = np.maximum(field - shore, 0)
    if not height.max() > 0:
        raise DataError(
            f"land_fraction={config.land_fraction} is less than one of the {field.size} points of "
            "the grid; raise it"
        )
    height *= config.mountain_height / height.max()
    smooth = np.exp(-4.0 * (degree / (config.wavenumbers + 1)) ** 4)
    return np.asarray(grid.to_modal(height)) * smooth, np.asarray(grid.to_modal(field - shore))


def _time_step(
    dino: Any, config: SimulateConfig, coords: Any, specs: Any, reference: Any, orography: Any
) -> Callable[[State], State]:
    units, integration = dino.scales.units, dino.time_integration
    dynamics = dino.primitive_equations.PrimitiveEquations(reference, orography, coords, specs)
    forcing = dino.held_suarez.HeldSuarezForcing(coords, specs, reference)
    step = specs.nondimensionalize(config.time_step_minutes * units.minute)
    dissipation = integration.horizontal_diffusion_step_filter(
        coords.horizontal,
        step,
        tau=specs.nondimensionalize(config.diffusion_hours * units.hour),
        order=_DISSIPATION_ORDER,
    )
    equations = integration.compose_equations([dynamics, forcing])
    return integration.step_with_filters(integration.imex_rk_sil3(equations, step), [dissipation])


def _mass_keeper(grid: Any, first: State) -> Callable[[State], State]:
    """Return a function that gives a state the mean surface pressure of the first one.

    Logarithms of pressure are what is integrated, and their exponential drifts: without this the
    atmosphere over mountains loses 0.15 % of its mass a year, and later years differ from earlier.
    """
    weights = np.polynomial.legendre.leggauss(grid.latitude_nodes)[1] / 2
    one = np.asarray(grid.to_modal(jnp.ones(grid.nodal_shape)))

    def mass(state: State) -> Array:
        pressure = jnp.exp(grid.to_nodal(state.log_surface_pressure))
        return (pressure.mean(-2) @ jnp.asarray(weights, pressure.dtype))[0]

    wanted = mass(first)

    def keep(state: State) -> State:
        shift = jnp.log(wanted / mass(state)) * one
        return state.replace(log_surface_pressure=state.log_surface_pressure + shift)

    return keep


class Recorder:
    """Turn a spectral state on sigma layers into fields in SI units on pressure levels."""

    def __init__(
        self,
        config: SimulateConfig,
        dino: Any,
        coords: Any,
        specs: Any,
        reference: Any,
        orography: Any,
    ):
        self._config, self._dino, self._coords, self._specs = config, dino, coords, specs
        self._reference, self._orography = reference, orography
        self._grid = dino.spherical_harmonic.Grid(
            longitude_wavenumbers=config.wavenumbers + 1,
            total_wavenumbers=config.wavenumbers + 2,
            longitude_nodes=config.longitudes,
            latitude_nodes=config.latitudes,
        )

    def on_grid(self, spectrum: Array) -> Array:
        """Return a spectrum's field on the output grid, `[..., H, W]`, rows from the north."""
        return self.turned(self._grid.to_nodal(spectrum))

    def turned(self, field: Array) -> Array:
        """Return dinosaur's `[..., longitude, latitude from the south]` as `[..., H, W]`."""
        return jnp.swapaxes(field, -1, -2)[..., ::-1, :]

    def scaled(self, field: Array, unit: str) -> Array:
        """Return a field, in dinosaur's own units, in one of the SI such as "meter / second"."""
        one = self._specs.dimensionalize(1.0, self._dino.scales.units(unit).units)
        return field * float(one.magnitude)

    def record(self, state: State) -> dict[str, Array]:
        """Return the variables of a state: `[levels, H, W]`, and surface pressure `[H, W]`.

        Linear in the logarithm of pressure between layers. Below the lowest layer and above the
        highest, winds and temperature stay, and geopotential goes on.
        """
        dino, coords, specs = self._dino, self._coords, self._specs
        pressure = self.scaled(jnp.exp(self.on_grid(state.log_surface_pressure)), "pascal")[0]
        east, north = dino.spherical_harmonic.vor_div_to_uv_nodal(
            self._grid, state.vorticity, state.divergence
        )
        warm = self.on_grid(state.temperature_variation) + self._reference[:, None, None]
        height = dino.primitive_equations.get_geopotential(
            state.temperature_variation,
            self._reference,
            self._orography,
            coords.vertical,
            specs.g,
            specs.R,
        )
        layers = {
            "geopotential": self.scaled(self.on_grid(height), "meter ** 2 / second ** 2"),
            "temperature": self.scaled(warm, "kelvin"),
            "u_component_of_wind": self.scaled(self.turned(east), "meter / second"),
            "v_component_of_wind": self.scaled(self.turned(north), "meter / second"),
        }
        levels = 100.0 * jnp.array(self._config.levels, jnp.float32)[:, None, None]
        target = jnp.log(levels / pressure)
        known = jnp.log(jnp.asarray(coords.vertical.centers, jnp.float32))
        found: dict[str, Array] = {
            name: interpolate(layers[name], known, target, extrapolate=name == "geopotential")
            for name in self._config.variables
        }
        return found | {"surface_pressure": pressure}


def interpolate(
    values: Float[Array, "K H W"],
    known: Float[Array, " K"],
    target: Float[Array, "P H W"],
    *,
    extrapolate: bool,
) -> Float[Array, "P H W"]:
    """Interpolate columns linearly from the ascending coordinate `known` to `target`.

    Beyond the ends the nearest value stays, or with `extrapolate` the line goes on.
    """
    above: Int[Array, "P H W"] = jnp.clip(jnp.searchsorted(known, target), 1, len(known) - 1)
    share = (target - known[above - 1]) / (known[above] - known[above - 1])
    if not extrapolate:
        share = jnp.clip(share, 0, 1)
    low, high = (jnp.take_along_axis(values, at, axis=0) for at in (above - 1, above))
    return low + share * (high - low)
