# SPDX-License-Identifier: Apache-2.0
"""Fields on the sphere: grids, area weights, spherical harmonics and spectra."""

from typing import TYPE_CHECKING

from sqzjax._lazy import lazy
from sqzjax.sphere.grid import Grid

if TYPE_CHECKING:
    from sqzjax.sphere.harmonics import AnalysisTables, SynthesisTables, Transform, max_degree
    from sqzjax.sphere.transform import cross_spectrum, forward, inverse, power_spectrum

__all__ = [
    "AnalysisTables",
    "Grid",
    "SynthesisTables",
    "Transform",
    "cross_spectrum",
    "forward",
    "inverse",
    "max_degree",
    "power_spectrum",
]

__getattr__ = lazy(
    __name__,
    {
        "AnalysisTables": "harmonics",
        "SynthesisTables": "harmonics",
        "Transform": "harmonics",
        "cross_spectrum": "transform",
        "forward": "transform",
        "inverse": "transform",
        "max_degree": "harmonics",
        "power_spectrum": "transform",
    },
)
