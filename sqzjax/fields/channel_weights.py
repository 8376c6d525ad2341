# SPDX-License-Identifier: Apache-2.0
"""Weights of weather channels by their names, as GraphCast sets them. Imports no jax."""

from collections.abc import Sequence

from sqzjax.fields.names import split_channel

_PER_HPA, _SURFACE, _TWO_METRES = 0.001, 0.1, 1.0


def channel_weights(names: Sequence[str]) -> tuple[float, ...]:
    """Return the weight of each channel divided by their mean (GraphCast, arXiv 2212.12794).

    Channels at pressure level p hPa, named such as "temperature_500", weigh 0.001 p, the
    temperature at 2 m 1, other fields of the surface 0.1. Short names ("t_500", "2t") will do.
    ValueError without channels.
    """
    if not names:
        raise ValueError("channels=() must name every channel, so that its weight can be found")
    weights = [_weight(name) for name in names]
    mean = sum(weights) / len(weights)
    return tuple(weight / mean for weight in weights)


def _weight(channel: str) -> float:
    variable, level = split_channel(channel)
    if level is not None:
        return _PER_HPA * level
    return _TWO_METRES if variable == "2m_temperature" else _SURFACE
