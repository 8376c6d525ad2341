# SPDX-License-Identifier: Apache-2.0
"""Pearson's chi-square test, for tests that check a distribution."""

import jax
import numpy as np


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Return the probability of counts at least this far from what was expected.

    Cells expecting fewer than 5 are pooled, as the approximation requires.
    """
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum()).astype(np.float64)
    wanted = np.append(expected[common], expected[~common].sum()).astype(np.float64)
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = float(np.sum((observed - wanted) ** 2 / wanted))
    return float(jax.scipy.special.gammaincc((len(wanted) - 1) / 2, statistic / 2))
