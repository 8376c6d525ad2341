# SPDX-License-Identifier: Apache-2.0
"""Which settings of a crossed test run by default: every value of every parameter, few in all."""

from itertools import product
from types import SimpleNamespace

import pytest

from tests.conftest import _every_value


class Setting:
    """An item as pytest collects it: one id for each `parametrize`."""

    def __init__(self, *ids: str):
        # pytest numbers settings, not values: all numbers differ.
        self.callspec = SimpleNamespace(_idlist=ids, indices={"all": object()})


@pytest.mark.parametrize("sizes", [(3, 15), (2, 9, 2), (4,), (1, 1)])
def test_every_value_occurs_and_no_more_settings_than_the_longest_parameter_run(sizes):
    settings = [Setting(*map(str, ids)) for ids in product(*map(range, sizes))]
    kept = [setting.callspec._idlist for setting in _every_value(settings)]
    assert len(kept) == len(set(kept)) == max(sizes)
    for place, size in enumerate(sizes):
        assert {ids[place] for ids in kept} == set(map(str, range(size)))


def test_pytest_still_names_a_setting_by_one_id_per_parametrize(request):
    items = [i for i in request.session.items if i.name.startswith("test_every_value_occurs")]
    assert all(len(item.callspec._idlist) == 1 for item in items)
