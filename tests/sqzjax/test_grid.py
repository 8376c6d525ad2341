# SPDX-License-Identifier: Apache-2.0
"""Grids: what is no grid is named, and one grid has one spelling."""

import math
from copy import copy

import pytest

from sqzjax.sphere import Grid

REGION = Grid(latitudes=4, longitudes=8, layout="region", north=50.0, spacing=0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latitudes": 1}, "latitudes=1 must be an integer >= 2"),
        ({"longitudes": 8.0}, "longitudes=8.0 must be an integer >= 2"),
        ({"layout": "cell"}, "layout='cell' must be one of"),
        ({"west": math.nan}, "west=nan must be a finite number of degrees"),
        ({"west": "a"}, "west='a' must be a finite number of degrees"),
        ({"north": math.inf}, "north=inf must be a finite number"),
        ({"spacing": 0.0}, "spacing=0.0 must be > 0"),
        ({"spacing": None}, "a region needs the degrees"),
        ({"layout": "cells"}, "other layouts follow from their size"),
        ({"spacing": 50.0}, "leave the sphere"),
        ({"longitudes": 721}, "721 columns of spacing=0.5 go round the globe more than once"),
    ],
)
def test_what_is_no_grid_is_refused(changes, words):
    grid = copy(REGION)
    for name, value in changes.items():  # past the type checks of the tests
        object.__setattr__(grid, name, value)
    with pytest.raises(ValueError) as error:
        grid.__post_init__()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("west", "kept"), [(-10.0, 350.0), (360.0, 0.0), (730.5, 10.5), (-1e-15, 0.0)]
)
def test_longitudes_begin_within_one_turn(west, kept):
    assert Grid(latitudes=4, longitudes=8, west=west).west == kept
    whole = Grid(latitudes=4, longitudes=720, layout="region", north=50.0, spacing=0.5)
    assert whole.longitude()[-1] == 359.5
