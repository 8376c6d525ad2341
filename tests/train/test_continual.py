# SPDX-License-Identifier: Apache-2.0
"""The schedule of trunks and cooldowns against the published arithmetic, and branches."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax import config as configs
from tests.tolerances import SCHEDULE_REL
from train.continual import Branch, Continual
from train.optim import ScheduleConfig

PEAK = 5e-4


def rates(schedule, steps, first=0):
    """Rates of the steps from `first` on, computed as the training step does."""
    numbers = jnp.arange(first, steps, dtype=jnp.int32)
    return np.asarray(jax.jit(jax.vmap(lambda n: schedule.rate(n, steps)))(numbers))


def published(first, last, fraction):
    """Rates of a branch from checkpoint `first` to `last`, word for word (section 3.4)."""
    cooling = last - first if fraction is None else int(fraction * last)
    constant = last - first - cooling
    falling = [PEAK * (1 - math.sqrt(j / cooling)) for j in range(1, cooling + 1)]
    return np.array([PEAK] * constant + falling, np.float64)


def test_the_trunk_warms_up_and_stays():
    found = rates(Continual(), 2000)
    wanted = [PEAK * (x + 1) / 500 if x < 500 else PEAK for x in range(2000)]
    np.testing.assert_allclose(found, wanted, rtol=SCHEDULE_REL)
    assert found.dtype == np.float32
    assert set(found[499:]) == {np.float32(PEAK)}
    assert found[0] == pytest.approx(PEAK / 500, rel=SCHEDULE_REL)


@pytest.mark.parametrize(
    ("first", "last", "fraction"),
    [(42_000, 50_000, 0.05), (950, 1000, 0.05), (1900, 2000, None), (600, 1001, 0.29)],
)
def test_branches_have_the_published_rates(first, last, fraction):
    branch = Branch(run="trunk", step=first)
    schedule = branch.schedule(Continual(cooldown=fraction), last)
    branch.check(last, schedule)
    found = rates(schedule, last, first)
    wanted = published(first, last, fraction)
    np.testing.assert_allclose(found, wanted, rtol=SCHEDULE_REL, atol=SCHEDULE_REL * PEAK)
    constant = int((wanted == PEAK).sum())
    assert set(found[:constant]) <= {np.float32(PEAK)} and found[constant] < PEAK
    assert found[-1] == 0.0 and np.all(found[:-1] > 0)


@settings(max_examples=20, deadline=None)
@given(
    steps=st.integers(20, 400),
    longer=st.integers(0, 400),
    cooldown=st.floats(0.0, 0.9),
    warmup=st.integers(0, 10),
)
def test_rates_before_the_cooldown_do_not_depend_on_the_length(steps, longer, cooldown, warmup):
    trunk = rates(Continual(warmup_steps=warmup), steps + longer)
    cooled = Continual(warmup_steps=warmup, cooldown=cooldown)
    begin = steps - int(cooldown * steps)
    np.testing.assert_array_equal(rates(cooled, steps)[:begin], trunk[:begin])


def test_a_linear_cooldown_falls_evenly():
    found = rates(Continual(warmup_steps=0, cooldown_steps=4, shape="linear"), 6)
    wanted = [PEAK * share for share in (1, 1, 0.75, 0.5, 0.25, 0)]
    np.testing.assert_allclose(found, wanted, rtol=SCHEDULE_REL)


def test_a_cooldown_of_zero_is_constant_in_a_branch_too():
    constant = Continual(cooldown=0.0)
    assert Branch(run="trunk", step=5).schedule(constant, 9) == constant
    assert constant.num_cooldown_steps(9) == 0


def test_the_schedule_is_one_of_the_configuration():
    found = configs.load(ScheduleConfig, {"kind": "continual", "shape": "linear"})
    assert found == Continual(shape="linear")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a number > 0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"cooldown": 1.5}, "cooldown=1.5"),
        ({"cooldown_steps": -2}, "cooldown_steps=-2"),
        ({"cooldown": 0.1, "cooldown_steps": 3}, "give one"),
    ],
)
def test_bad_schedules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Continual(**fields)


def test_bad_lengths_are_refused():
    schedule = Continual(warmup_steps=10, cooldown_steps=20)
    schedule.check(30)
    with pytest.raises(ValueError, match="exceed steps=29"):
        schedule.check(29)
    Continual(warmup_steps=500).check(100)  # a piece of a trunk may end inside the warm-up
    branch = Branch(run="trunk", step=80)
    branch.check(100, schedule)
    with pytest.raises(ValueError, match="branch at 79 or earlier"):
        branch.check(99, schedule)
    whole = Continual(warmup_steps=10)
    Branch(run="trunk", step=10).check(30, whole)
    with pytest.raises(ValueError, match=r"inside the warm-up .* at warmup_steps=10 or later"):
        Branch(run="trunk", step=9).check(30, whole)
    Branch(run="trunk", step=9).check(30, replace(whole, cooldown=0.0))
    for step, run in ((0, "trunk"), (1, "")):
        with pytest.raises(ValueError, match="must be"):
            Branch(run=run, step=step)
    with pytest.raises(ValueError, match="below steps=100"):
        replace(branch, step=100).check(100)
