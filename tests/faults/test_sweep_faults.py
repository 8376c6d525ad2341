# SPDX-License-Identifier: Apache-2.0
"""Sweeps that are killed, asked to stop and started again; on processes and on a Ray cluster."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sqzjax import config as configs
from tests.train.sweep_toy import TRAIN, lines, points, toy_config
from train.sweep_config import CosineBaseline, LocalExecutor, RayExecutor, Variant

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240
_SCRIPT = """
import json, sys
from pathlib import Path
from sqzjax import config as configs
from tests.train.sweep_toy import TRAINER
from train.sweep import run
from train.sweep_config import SweepConfig
config = configs.load(SweepConfig, json.loads(sys.argv[1]))
sys.exit(run(config, workdir=Path(sys.argv[2]), trainer=TRAINER))
"""
LONG = LocalExecutor(environment={"TOY_SLEEP": "0.01"})


def start(config, workdir) -> Any:
    """Start a sweep of stand-ins in a process of its own."""
    text = json.dumps(configs.to_dict(config))
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, text, str(workdir)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process) -> tuple[int, str]:
    _, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, errors


def wait_for(process, condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start_and_wait_for_a_job(config, workdir) -> Any:
    """Return the process once it has started a job, or ended because none was left to start."""

    def started() -> int:
        return sum(lines(workdir, "starts.log").values())

    before = started()
    process = start(config, workdir)
    wait_for(process, lambda: started() > before or process.poll() == 0)
    return process


def job_processes(workdir) -> list[int]:
    """Ids of processes whose command line names a folder of the sweep's jobs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if f"{workdir}/jobs/".encode() in words:
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Results of a sweep that ran through."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, errors = end(start(toy_config(), folder))
    assert code == 0, errors
    return (folder / "results.json").read_bytes()


@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 3), *(pytest.param(5, s, marks=pytest.mark.slow) for s in range(6))]
)
@pytest.mark.slow
def test_a_sweep_killed_at_random_ends_with_the_same_results(undisturbed, tmp_path, kills, seed):
    """No job runs twice to completion either, whichever signal ends the sweep."""
    moments = random.Random(seed)
    config = toy_config(executor=LONG)
    for _ in range(kills):
        process = start_and_wait_for_a_job(config, tmp_path)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(moments.choice((signal.SIGKILL, signal.SIGTERM)))
        end(process)
    code, errors = end(start(config, tmp_path))
    assert code == 0, errors
    assert (tmp_path / "results.json").read_bytes() == undisturbed
    completed = lines(tmp_path, "completed.log")
    assert len(completed) == 8 and set(completed.values()) == {1}
    assert sum(lines(tmp_path, "starts.log").values()) > 8, "nothing was interrupted"


def test_sigterm_lets_the_jobs_save(undisturbed, tmp_path):
    process = start(toy_config(executor=LONG), tmp_path)
    wait_for(process, lambda: len(lines(tmp_path, "starts.log")) == 2)
    process.send_signal(signal.SIGTERM)
    code, errors = end(process)
    assert code == 75, errors
    assert "the running jobs save and end" in (tmp_path / "sweep.log").read_text()
    assert not job_processes(tmp_path)
    saved = [json.loads(p.read_text())[0] for p in (tmp_path / "jobs").rglob("checkpoints/*.json")]
    assert len(saved) == 2 and all(saved)
    assert "0 running, 8 pending" in (tmp_path / "status.md").read_text()
    assert end(start(toy_config(executor=LONG), tmp_path))[0] == 0
    assert (tmp_path / "results.json").read_bytes() == undisturbed


def test_jobs_that_are_asked_to_stop_while_they_start_have_not_failed(undisturbed, tmp_path):
    """They die of the signal: nothing handles it yet."""
    config = toy_config(retries=0)
    process = start(config, tmp_path)
    wait_for(process, lambda: list(tmp_path.rglob("job.log")))
    process.send_signal(signal.SIGTERM)
    code, errors = end(process)
    assert code == 75, errors
    assert "0 failed" in (tmp_path / "status.md").read_text()
    assert end(start(config, tmp_path))[0] == 0
    assert (tmp_path / "results.json").read_bytes() == undisturbed


@pytest.mark.skipif(sys.platform != "linux", reason="bound to the parent by a call of Linux")
def test_a_killed_sweep_leaves_no_job_behind(tmp_path):
    slow = LocalExecutor(environment={"TOY_SLEEP": "0.2"})
    process = start(toy_config(executor=slow), tmp_path)
    wait_for(process, lambda: len(lines(tmp_path, "starts.log")) == 2)
    assert len(job_processes(tmp_path)) == 2
    process.kill()
    end(process)
    deadline = time.monotonic() + 20
    while job_processes(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_restart_waits_for_a_job_left_behind_and_takes_its_result(undisturbed, tmp_path):
    """A job of a killed sweep may go on to its end, where nobody binds it to its parent."""
    process = start(toy_config(executor=LONG), tmp_path)
    wait_for(process, lambda: len(lines(tmp_path, "starts.log")) == 2)
    process.kill()
    end(process)
    folder = tmp_path / "jobs" / "w16" / "trunk_0000020"
    command = [sys.executable, "-m", "tests.train.sweep_toy", str(folder / "config.yaml")]
    while job_processes(tmp_path):
        time.sleep(0.02)
    (folder / "starts.log").unlink()
    environment = {**os.environ, "TOY_SLEEP": "0.1"}
    with subprocess.Popen(
        [*command, "--workdir", str(folder)], cwd=ROOT, env=environment
    ) as orphan:
        wait_for(orphan, (folder / "starts.log").exists)
        code, errors = end(start(toy_config(executor=LONG), tmp_path))
    assert code == 0, errors
    assert len((folder / "starts.log").read_text().splitlines()) == 1
    assert (tmp_path / "results.json").read_bytes() == undisturbed


def test_a_damaged_result_is_named(tmp_path):
    code, _ = end(start(toy_config(), tmp_path))
    assert code == 0
    result = tmp_path / "jobs" / "w16" / "w16@3e8" / "result.json"
    result.write_text(result.read_text()[:20])
    code, errors = end(start(toy_config(), tmp_path))
    assert code == 1 and f"{result} is damaged" in errors


# Ray ---------------------------------------------------------------------------------------------

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the package ray is not installed"
)
RAY = RayExecutor(num_cpus=2, environment=LONG.environment)


@needs_ray
@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_worker_gives_the_same_results(undisturbed, tmp_path):
    slow = replace(RAY, environment={"TOY_SLEEP": "0.05"})
    process = start(toy_config(executor=slow, retries=0), tmp_path)
    wait_for(process, lambda: len(lines(tmp_path, "starts.log")) == 2)
    job = min(job_processes(tmp_path))
    worker = int(Path(f"/proc/{job}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(worker, signal.SIGKILL)
    code, errors = end(process)
    assert code == 0, errors
    assert (tmp_path / "results.json").read_bytes() == undisturbed
    assert set(lines(tmp_path, "completed.log").values()) == {1}
    assert sum(lines(tmp_path, "starts.log").values()) == 9
    assert "was lost" in (tmp_path / "sweep.log").read_text()


@needs_ray
@pytest.mark.slow
def test_sigterm_lets_the_jobs_of_a_ray_cluster_save(undisturbed, tmp_path):
    process = start(toy_config(executor=RAY), tmp_path)
    wait_for(process, lambda: len(lines(tmp_path, "starts.log")) == 2)
    process.send_signal(signal.SIGTERM)
    code, errors = end(process)
    assert code == 75, errors
    assert not job_processes(tmp_path)
    code, errors = end(start(toy_config(executor=RAY), tmp_path))
    assert code == 0, errors
    assert (tmp_path / "results.json").read_bytes() == undisturbed


@needs_ray
@pytest.mark.slow
def test_a_killed_sweep_on_ray_goes_on(undisturbed, tmp_path):
    for _ in range(3):
        process = start_and_wait_for_a_job(toy_config(executor=RAY), tmp_path)
        process.kill()
        end(process)
    code, errors = end(start(toy_config(executor=RAY), tmp_path))
    assert code == 0, errors
    assert (tmp_path / "results.json").read_bytes() == undisturbed
    assert set(lines(tmp_path, "completed.log").values()) == {1}


# The real trainer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A sweep of tiny language models on made-up lines."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("".join(f"line {i}, {i * i}.\n" for i in range(2000)))
    train = {
        **TRAIN,
        "mesh": {"data": 1},
        "data": {
            "sources": [{"kind": "text", "paths": [str(folder / "text.txt")]}],
            "eval_fraction": 0.1,
            "eval_split": "tail",
        },
        "checkpoint": {"interval": 5, "keep": 1, "minutes": 0},
    }
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return toy_config(
        train=train,
        variants={"linear": Variant(overrides={"schedule.shape": "linear"}, sizes=("w16",))},
        cosine=CosineBaseline(sizes=("w16",), budgets=(1.5e8,)),
        executor=LocalExecutor(environment=environment),
    )


def train_sweep(config, workdir) -> Any:
    path = workdir.parent / f"{workdir.name}.yaml"
    path.write_text(configs.dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "train", str(path), "--workdir", str(workdir)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def parameters(workdir) -> dict[str, bytes]:
    """Final parameters of every job."""
    import jax

    from sqzjax.io.checkpoint import restore_params

    found = {}
    for point in points(workdir):
        folder = workdir / point["workdir"] / "checkpoints" / str(point["steps"])
        leaves = jax.tree.leaves(restore_params(folder).items["params"])
        found[point["workdir"]] = b"".join(np.asarray(leaf).tobytes() for leaf in leaves)
    return found


@pytest.mark.slow
def test_real_trainings_survive_kills_and_agree_between_executors(real, tmp_path):
    whole, killed, ray = tmp_path / "whole", tmp_path / "killed", tmp_path / "ray"
    code, errors = end(train_sweep(real, whole))
    assert code == 0, errors
    wanted = parameters(whole)
    assert len(wanted) == 11 and len(set(wanted.values())) == 11
    moments = random.Random(0)
    for _ in range(5):
        process = train_sweep(real, killed)
        time.sleep(moments.uniform(3, 20))
        process.send_signal(moments.choice((signal.SIGKILL, signal.SIGTERM)))
        end(process)
    code, errors = end(train_sweep(real, killed))
    assert code == 0, errors
    assert points(killed) == points(whole)
    assert parameters(killed) == wanted
    if importlib.util.find_spec("ray") is None:
        pytest.skip("the package ray is not installed: only processes were tried")
    executor = RayExecutor(num_cpus=2, environment=real.executor.environment)
    code, errors = end(train_sweep(replace(real, executor=executor), ray))
    assert code == 0, errors
    assert points(ray) == points(whole)
    assert parameters(ray) == wanted
