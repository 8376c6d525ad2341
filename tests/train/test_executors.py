# SPDX-License-Identifier: Apache-2.0
"""Executors of sweeps: their settings, and Ray's side of them without a cluster."""

import sys
import types
from typing import Any

import pytest

from sqzjax.errors import ConfigError
from train.executors import EXIT_LOST, Ray
from train.sweep_config import LocalExecutor, RayExecutor


@pytest.fixture
def ray(monkeypatch):
    """A stand-in for the package; `nodes` are the machines of its cluster."""

    class RayError(Exception):
        pass

    fake: Any = types.ModuleType("ray")
    fake.machines = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}]
    fake.nodes = lambda: fake.machines
    fake.init = lambda **_: None
    fake.shutdown = lambda: None
    fake.wait = lambda tasks, **_: (tasks, [])
    fake.get = lambda task: task()
    fake.remote = lambda **_: (
        lambda function: types.SimpleNamespace(
            options=lambda **_: types.SimpleNamespace(remote=lambda job: job["task"])
        )
    )
    exceptions: Any = types.ModuleType("ray.exceptions")
    exceptions.RayError = RayError
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    return fake


def test_no_more_jobs_are_handed_to_ray_than_its_machines_hold(ray):
    ray.machines += [{"Alive": True, "Resources": {"CPU": 9.0}}, {"Alive": False, "Resources": {}}]
    with Ray(RayExecutor(cpus_per_job=4.0)) as pool:
        for name in "abc":
            assert pool.free
            pool.start({"name": name, "task": lambda: 0})  # type: ignore[typeddict-item]
        assert not pool.free
        assert pool.poll() == [("a", 0), ("b", 0), ("c", 0)] and pool.free


def test_a_lost_worker_is_told_from_a_failed_job(ray):
    def lost():
        raise sys.modules["ray.exceptions"].RayError("")

    with Ray(RayExecutor()) as pool:
        pool.start({"name": "a", "task": lost})  # type: ignore[typeddict-item]
        assert pool.poll() == [("a", EXIT_LOST)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpus_per_job": 5.0}, "no machine of the Ray cluster has cpus_per_job=5"),
        ({"gpus_per_job": 2.0}, "and gpus_per_job=2"),
        ({"address": "auto"}, "address='auto': no Ray cluster answers .no GCS.; start one with"),
    ],
)
def test_clusters_that_cannot_run_a_job_are_refused(ray, settings, message):
    def init(address, **_):
        if address == "auto":
            raise ConnectionError("no GCS")

    ray.init = init
    with pytest.raises(ConfigError, match=message), Ray(RayExecutor(**settings)):
        pass


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (LocalExecutor, {"workers": 0}, "workers=0"),
        (LocalExecutor, {"cpus_per_job": 0}, "cpus_per_job=0"),
        (RayExecutor, {"cpus_per_job": -1.0}, "cpus_per_job=-1.0"),
        (RayExecutor, {"cpus_per_job": 0.0}, "all jobs would start at once"),
        (RayExecutor, {"num_cpus": 2, "address": "auto"}, "needs address: null"),
        (RayExecutor, {"num_cpus": 2, "cpus_per_job": 4.0}, "no job would ever start"),
    ],
)
def test_bad_executors_are_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)
