# SPDX-License-Identifier: Apache-2.0
"""Tables of levels that are not at equal distances, and how to find the nearest one."""

from functools import cache
from statistics import NormalDist

import numpy as np

from sqzjax.checks import check_choice
from sqzjax.typing import Array, Float, Int

BITS = (2, 3, 4, 6)
"""Bits of the codes of tables; reading costs 2**bits - 1 selects per element."""
_EDGE = (1 / 32 + 1 / 30) / 2


def check_bits(bits: int) -> None:
    """Raise ValueError for a width that tables do not have."""
    check_choice("bits", bits, BITS)


@cache
def normal_float(bits: int) -> Float[np.ndarray, "N"]:
    """Return the 2**bits ascending NormalFloat levels, from -1 over 0 to 1 (arXiv 2305.14314).

    Quantiles of the normal distribution, one more above zero than below; those at the ends leave
    out a probability of (1/32 + 1/30) / 2 whatever the bits, as KVQuant's code has it.
    """
    check_bits(bits)
    half = 2 ** (bits - 1)
    quantile = np.vectorize(NormalDist().inv_cdf)
    above = quantile(np.linspace(0.5, 1 - _EDGE, half + 1))
    below = -quantile(np.linspace(1 - _EDGE, 0.5, half))
    levels = np.concatenate([below, above[1:]]) / above[-1]
    levels.setflags(write=False)
    return levels


def nearest(
    x: Float[Array, "*lead S H"], table: Float[Array, "*lead2 1 N"]
) -> Int[Array, "*lead S H"]:
    """Return the index of the nearest entry of an ascending table; of two, the lower one."""
    middles = (table[..., 1:] + table[..., :-1]) / 2
    return sum(  # type: ignore[return-value]
        (x > middles[..., i : i + 1]).astype(np.int32) for i in range(middles.shape[-1])
    )
