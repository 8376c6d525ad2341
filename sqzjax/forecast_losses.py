# SPDX-License-Identifier: Apache-2.0
"""Losses between forecast and true fields, and the rollout that they are taken of.

Each loss takes fields `[..., C, H, W]` in normalised units and returns one float32 number per
sample, the mean over its channels. `mse` and `weighted_mse` punish what is displaced twice, so
models trained on them blur what they cannot predict; `amse` (arXiv 2501.19374) judges the amplitude
of each degree apart from its correlation, and costs a spherical-harmonic transform of both fields.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.sphere.grid import Grid
from sqzjax.sphere.harmonics import AnalysisTables, SynthesisTables, Transform
from sqzjax.sphere.transform import cross_spectrum, forward, inverse, power_spectrum
from sqzjax.typing import Array, Float, Params

Mean = Literal["max", "geometric"]
SpectralTables = tuple[AnalysisTables, SynthesisTables | None]
"""Tables of a transform; the second are needed where `unresolved` > 0."""
_EPS = 1e-14
"""Added to powers under a root, so that gradients stay finite where there is none."""


def mse(
    prediction: Float[Array, "*batch C H W"], target: Float[Array, "*batch C H W"]
) -> Float[Array, "*batch"]:
    """Return the plain mean of squares: neither areas nor channels are weighted."""
    return _square(prediction, target).mean((-3, -2, -1))


def weighted_mse(
    prediction: Float[Array, "*batch C H W"],
    target: Float[Array, "*batch C H W"],
    grid: Grid,
    channel_weights: Sequence[float] | None = None,
) -> Float[Array, "*batch"]:
    """Return the mean of squares weighted by area, and by channel with weights of mean 1."""
    return _weighted_mean(area_mse(prediction, target, grid), channel_weights)


def area_mse(
    prediction: Float[Array, "*batch H W"], target: Float[Array, "*batch H W"], grid: Grid
) -> Float[Array, "*batch"]:
    """Return the mean of squares over a field, rows weighted by cos(latitude) over its mean."""
    areas = grid.area_weights().astype(np.float32)
    return (_square(prediction, target).mean(-1) * areas).mean(-1)


def _square(prediction: Array, target: Array) -> Array:
    return jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))


def amse(
    prediction: Float[Array, "*batch C H W"],
    target: Float[Array, "*batch C H W"],
    transform: Transform,
    *,
    mean: Mean = "max",
    channel_weights: Sequence[float] | None = None,
    unresolved: float = 0.0,
    tables: SpectralTables | None = None,
) -> Float[Array, "*batch"]:
    """Return the adjusted mean square error of the spectra, summed over degrees.

    Of each degree (sqrt X - sqrt Y)^2 + 2 max(X, Y) (1 - c) with powers X, Y and coherence c.
    `mean="geometric"` puts sqrt(X Y) in place of the maximum, which gives the ordinary square error
    of the spectra, 4 pi times the mean square over the sphere.

    Harmonics do not see everything: near the poles they are smooth along a row, and noise of a
    model there costs nothing. `unresolved` times 4 pi times the plain mean square of what of the
    error the harmonics leave out is added (one more transform, and its tables).

    `tables` are those of the transform: where they are not small, give them as arguments of the
    program, whose constants they become otherwise (`spectral_tables`). ValueError if they are not
    the transform's, or `mean` is unknown.
    """
    if mean not in get_args(Mean):
        raise ValueError(f"mean={mean!r} must be one of {list(get_args(Mean))}")
    analysis, synthesis = tables or (None, None)
    prediction, target = (field.astype(jnp.float32) for field in (prediction, target))
    x, y = (forward(field, transform, analysis) for field in (prediction, target))
    errors = _amse_of_degrees(x, y, mean).sum(-1)
    if unresolved:
        left = prediction - target - inverse(x - y, transform, synthesis)
        errors = errors + 4.0 * jnp.pi * unresolved * jnp.square(left).mean((-2, -1))
    return _weighted_mean(errors, channel_weights)


def spectral_tables(transform: Transform, unresolved: float = 0.0) -> SpectralTables:
    """Return the tables that `amse` needs, in numpy."""
    return transform.analysis_tables(), transform.synthesis_tables() if unresolved else None


def _amse_of_degrees(x: Array, y: Array, mean: Mean) -> Array:
    power_x, power_y = power_spectrum(x), power_spectrum(y)
    root_x, root_y = jnp.sqrt(power_x + _EPS), jnp.sqrt(power_y + _EPS)
    difference = power_spectrum(x - y)
    # Differences of nearly equal numbers are avoided: sqrt X - sqrt Y = (X - Y) / (sqrt X +
    # sqrt Y), and X - Y = <x - y, x + y>.
    amplitude = jnp.square(cross_spectrum(x - y, x + y) / (root_x + root_y))
    # sqrt(X Y) (1 - c) is half of |x - y|^2 - (sqrt X - sqrt Y)^2, which is the better form of the
    # two where the spectra are alike, the worse where one of them is nearly nothing.
    product = root_x * root_y
    alike = difference < product
    incoherent = jnp.where(alike, (difference - amplitude) / 2.0, product - cross_spectrum(x, y))
    if mean == "geometric":
        return amplitude + 2.0 * incoherent
    ratio = jnp.maximum(root_x, root_y) / jnp.minimum(root_x, root_y)
    return amplitude + 2.0 * ratio * incoherent


def rollout(
    model: Any,
    params: Params,
    window: Float[Array, "B T C H W"],
    constants: Float[Array, "B K H W"],
    steps: int,
) -> Float[Array, "n B C H W"]:
    """Apply an emulator `steps` times to its own output and return the states, float32.

    `model.forward(params, fields)` takes `[B, T, C + K, H, W]` to the next state `[B, C, H, W]`,
    normalised. `window` holds the last T states, the newest last; `constants` are appended to each
    of them. The result does not show the window: its entry n is n + 1 steps ahead. Differentiable
    through the chain; more than one step are recomputed in the backward pass, so that the states
    alone are kept.
    """

    def step(window: Array, _: None) -> tuple[Array, Array]:
        state = model.forward(params, with_constants(window, constants))
        return jnp.concatenate([window[:, 1:], state[:, None]], axis=1), state

    body = jax.checkpoint(step, prevent_cse=False) if steps > 1 else step
    return jax.lax.scan(body, window.astype(jnp.float32), None, length=steps)[1]


def with_constants(
    window: Float[Array, "B T C H W"], constants: Float[Array, "B K H W"]
) -> Float[Array, "B T CK H W"]:
    """Append the constant fields to the channels of every state."""
    repeated = jnp.repeat(constants[:, None], window.shape[1], axis=1)
    return jnp.concatenate([window, repeated.astype(window.dtype)], axis=2)


def _weighted_mean(values: Array, weights: Sequence[float] | None) -> Array:
    """Average over channels, the last axis."""
    if weights is None:
        return values.mean(-1)
    if len(weights) != values.shape[-1]:
        raise ValueError(
            f"channel_weights has {len(weights)} numbers, the fields {values.shape[-1]} channels"
        )
    scaled = np.asarray(weights, np.float32)
    return (values * (scaled / scaled.mean())).mean(-1)
