# SPDX-License-Identifier: Apache-2.0
"""Random integer weights and their product in float64, for the tests of every backend."""

import numpy as np


def random_weights(bits, inputs, outputs, group_size, seed=0):
    """Return codes over the whole range, both ends included, and scales of mixed signs."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (inputs, outputs))
    codes[0, :2] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales = generator.standard_normal((inputs // group_size, outputs)).astype(np.float32)
    return codes.astype(np.int8), scales


def product(x, codes, scales):
    """Return x times the kernel, group by group as the definition has it."""
    x, codes, scales = (np.asarray(a, np.float64) for a in (x, codes, scales))
    group_size = codes.shape[0] // scales.shape[0]
    total = np.zeros((x.shape[0], codes.shape[1]))
    for group, scale in enumerate(scales):
        rows = slice(group * group_size, (group + 1) * group_size)
        total += scale * (x[:, rows] @ codes[rows])
    return total


def relative_error(y, reference):
    """Return the largest error over the largest value; nan where y has one."""
    return np.abs(np.asarray(y, np.float64) - reference).max() / np.abs(reference).max()
