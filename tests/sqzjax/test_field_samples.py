# SPDX-License-Identifier: Apache-2.0
"""Statistics of archives, normalised states, periods and samples, against numpy."""

import json

import numpy as np
import pytest

from sqzjax.errors import DataError
from sqzjax.fields import Period, States, open_archive, periods, statistics_for
from sqzjax.fields.statistics import Moments, Statistics
from tests import tolerances as tol
from tests.sqzjax import weather


@pytest.fixture(scope="module")
def dataset():
    return weather.make()


@pytest.fixture(scope="module")
def plain(dataset, tmp_path_factory):
    """The dataset as a Zarr store in its own order."""
    return weather.write(dataset, tmp_path_factory.mktemp("plain") / "a.zarr")


def test_statistics_are_those_of_float64(dataset, plain, tmp_path, monkeypatch):
    from sqzjax.fields import statistics

    archive = open_archive(plain)
    monkeypatch.setattr(statistics, "_CHUNK_BYTES", 7 * archive.state_bytes)
    chosen = np.r_[0:11, 13:30]
    path = tmp_path / "deep" / "statistics.json"
    found = statistics_for(archive, chosen, path=path)
    states = weather.expected(dataset, archive.channels).astype(np.float64)
    wanted = states[chosen].mean((0, 2, 3)), states[chosen].std((0, 2, 3))
    np.testing.assert_allclose(found.mean, wanted[0], rtol=tol.STATISTICS_REL)
    np.testing.assert_allclose(found.std, wanted[1], rtol=tol.STATISTICS_REL)
    # Other parts, which are summed in another order, give the same numbers.
    monkeypatch.setattr(statistics, "_CHUNK_BYTES", 3 * archive.state_bytes)
    assert statistics_for(archive, chosen).digest == found.digest
    normal = found.normalise(archive.read(chosen))
    np.testing.assert_allclose(normal.mean((0, 2, 3)), 0, atol=tol.NORMALISED_MEAN)
    error = np.abs(found.denormalise(normal) - archive.read(chosen)).max((0, 2, 3))
    assert (error / np.abs(states).max((0, 2, 3)) < tol.DENORMALISED_REL).all()


def test_stored_statistics_are_used_for_what_they_are_of_and_only_that(
    plain, tmp_path, monkeypatch
):
    from sqzjax.fields import statistics

    archive, path = open_archive(plain), tmp_path / "statistics.json"
    first = statistics_for(archive, range(20), path=path)
    assert Statistics.load(path).digest == first.digest
    with monkeypatch.context() as patched:
        patched.setattr(statistics, "compute", None)
        assert statistics_for(archive, range(20), path=path).digest == first.digest
    assert statistics_for(archive, range(21), path=path).digest != first.digest
    other = weather.write(weather.make(seed=1), tmp_path / "other.zarr")
    own = statistics_for(open_archive(other), range(20))
    first = statistics_for(archive, range(20), path=path)
    assert statistics_for(open_archive(other), range(20), path=path).digest == own.digest
    for damage in ({"std": [0.0] * 5}, {"std": [np.inf] * 5}, {"mean": [np.nan] * 5}, {"std": [1]}):
        stored = json.loads(path.read_text())
        (tmp_path / "damaged.json").write_text(json.dumps(stored | damage))
        with pytest.raises(DataError, match=r"holds no statistics \((means|one value)"):
            Statistics.load(tmp_path / "damaged.json")
    path.write_text("{}")
    with pytest.raises(DataError, match="holds no statistics"):
        Statistics.load(path)
    assert statistics_for(archive, range(20), path=path).digest == first.digest


def test_statistics_of_other_channels(plain):
    archive = open_archive(plain)
    every = statistics_for(archive, range(40))
    few = every.select(("temperature_850", "surface_pressure"))
    assert few.mean.tolist() == [every.mean[2], every.mean[0]]
    with pytest.raises(DataError, match="lack"):
        every.select(("vorticity",))


def test_a_channel_that_does_not_vary_is_refused(dataset, tmp_path):
    still = dataset.assign(surface_pressure=dataset.surface_pressure * 0 + 1)
    archive = open_archive(weather.write(still, tmp_path / "still.zarr"))
    with pytest.raises(DataError, match=r"\['surface_pressure'\] do not vary"):
        statistics_for(archive, range(40))


def test_moments_do_not_count_what_is_missing():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(9, 2, 3, 4)) + 1e4
    states[rng.random(states.shape) < 0.3] = np.nan
    states[4, 1] = np.nan
    moments = Moments(2)
    for part in np.array_split(states, [4, 5]):
        moments.add(part)
    np.testing.assert_allclose(moments.mean, np.nanmean(states, (0, 2, 3)), rtol=tol.FLOAT64_REL)
    np.testing.assert_allclose(moments.std, np.nanstd(states, (0, 2, 3)), rtol=tol.MOMENTS_REL)


def test_states_from_memory_and_from_the_archive_are_equal(plain):
    archive = open_archive(plain)
    statistics = statistics_for(archive, range(30))
    memory = States(archive, statistics, in_memory_bytes=40 * archive.state_bytes)
    lazy = States(archive, statistics, in_memory_bytes=40 * archive.state_bytes - 1)
    assert memory.in_memory and not lazy.in_memory
    assert np.array_equal(memory.read([3, 9, 3]), lazy.read([3, 9, 3]))
    some = States(archive, statistics, in_memory_bytes=3 * archive.state_bytes, times=[9, 3, 20])
    assert some.in_memory
    archive._data = {}  # whatever is read from now on is from memory
    assert np.array_equal(some.read([20, 3, 3]), memory.read([20, 3, 3]))
    with pytest.raises(KeyError):
        some.read([4])


def brute_force(times, bounds, hours, length):
    """Samples by trying every start."""
    step, found = np.timedelta64(hours, "h"), []
    place = {time: number for number, time in enumerate(times)}
    for begin, end in bounds:
        for start in range(begin, end):
            row = [place.get(times[start] + number * step) for number in range(length)]
            if all(at is not None and at < end for at in row):
                found.append(row)
    return np.array(sorted(found), np.int64).reshape(-1, length)


@pytest.mark.parametrize("hours", [3, 6, 12])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_samples_never_reach_over_gaps_or_ends(hours, length):
    whole = np.datetime64("2001-01-01", "ns") + np.arange(64) * np.timedelta64(3, "h")
    times = np.delete(whole, [10, 11, 30, 45])
    chosen = (Period(stop="2001-01-04"), Period(start=0.6, stop="2001-01-07T09"))
    bounds = [period.bounds(times) for period in chosen]
    assert bounds == [(0, np.sum(times < np.datetime64("2001-01-04"))), (36, bounds[1][1])]
    found = periods.samples(times, chosen, step_hours=hours, length=length)
    assert np.array_equal(found, brute_force(times, bounds, hours, length))
    assert len(found) > 3


def test_without_gaps_a_period_loses_stride_times_window_minus_one():
    times = np.datetime64("2001-01-01", "ns") + np.arange(100) * np.timedelta64(1, "h")
    found = periods.samples(times, (Period(),), step_hours=6, length=3)
    assert len(found) == 100 - 6 * (3 - 1)
    assert found[0].tolist() == [0, 6, 12] and found[-1].tolist() == [87, 93, 99]


def test_periods_that_overlap_give_each_sample_once():
    times = np.datetime64("2001-01-01", "ns") + np.arange(10) * np.timedelta64(6, "h")
    twice = (Period(stop=0.6), Period(start=0.3))
    assert periods.indices(times, twice).tolist() == list(range(10))
    found = periods.samples(times, twice, step_hours=6, length=2)
    assert found[:, 0].tolist() == list(range(9))
    with pytest.raises(DataError, match=r"2018\.\.0\.1 ends before it begins"):
        Period(start="2018", stop=0.1).bounds(times)
    assert Period(start="2018").bounds(times) == (10, 10)


def test_splits_must_not_share_times():
    times = np.datetime64("2001-01-01", "ns") + np.arange(10) * np.timedelta64(1, "h")
    first, second = (Period(stop=0.5),), (Period(start=0.5),)
    periods.check_apart(times, train=first, valid=second)
    with pytest.raises(DataError, match="train and valid share 1 times from 2001-01-01T04"):
        periods.check_apart(times, train=first, valid=(Period(start=0.4),))


@pytest.mark.parametrize(
    "bounds",
    [
        *({"start": text} for text in ("tomorrow", "", "now", "NaT", "20170601", "2017-13")),
        *({"stop": text} for text in ("1500", "2262", "2017-06-01T12Z")),
        {"stop": 2017.0},
        {"start": 0.5, "stop": 0.2},
        {"start": "2018", "stop": "2017-12-31T18"},
    ],
)
def test_bad_periods(bounds):
    with pytest.raises(ValueError, match=r"date|fraction|before"):
        Period(**bounds)
