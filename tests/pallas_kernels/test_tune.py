# SPDX-License-Identifier: Apache-2.0
"""The tuner keeps winners and leaves noise alone."""

import json
import time

import jax.numpy as jnp
import pytest

from pallas_kernels import common, tune
from pallas_kernels.bench.case import BenchCase
from pallas_kernels.bench.timing import Effort

QUICK = Effort(min_seconds=1e-4, repeats=3, cache_bytes=1, max_copies=2, calls=1)


def waits(seconds):
    """A program whose run time is known: a callback that sleeps."""
    import jax

    def sleep(x):
        time.sleep(seconds)
        return x

    return lambda x: jax.pure_callback(sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def case(name, **seconds):
    candidates = {json.dumps({"block": int(n[1:])}): waits(s) for n, s in seconds.items()}
    return BenchCase("op", name, lambda seed: (jnp.ones(4),), candidates, 16)


def test_the_fastest_sizes_are_written_and_read_back(tmp_path, monkeypatch):
    cases = [case("a", b1=0.02, b2=0.002), case("b", b1=0.002, b2=0.02)]
    won = list(tune.tune(cases, QUICK, budget_seconds=60))
    assert [(c.shape_name, sizes) for c, sizes, _ in won] == [("a", {"block": 2})]
    assert won[0][2] > 2
    path = tmp_path / "tuning" / "cpu.json"
    for winner, sizes, _ in won:
        tune.update(path, winner, sizes, {"device": "cpu"})
    tune.update(path, cases[1], {"block": 7}, {"device": "cpu"})
    monkeypatch.setattr(common.resources, "files", lambda package: tmp_path)
    common.tuning_table.cache_clear()
    cpu = common.Target("cpu", "cpu")
    assert common.tuned("op", "a", cpu) == {"block": 2}
    assert common.tuned("op", "b", cpu) == {"block": 7}
    common.tuning_table.cache_clear()


def test_a_broken_candidate_never_wins_and_time_is_kept():
    def broken(x):
        raise NotImplementedError("cannot")

    bad = case("a", b1=0.002)
    bad = BenchCase("op", "a", bad.make_inputs, {**bad.candidates, '{"block": 9}': broken}, 16)
    assert not list(tune.tune([bad], QUICK, budget_seconds=60))
    assert not list(tune.tune([bad], QUICK, budget_seconds=-1))


def test_without_kernels_there_is_nothing_to_tune(tmp_path, capsys):
    assert tune.main(["--folder", str(tmp_path)]) == 2
    assert "nothing to tune on cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--only", "("])
    assert stopped.value.code == 2
