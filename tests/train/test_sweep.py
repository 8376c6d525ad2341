# SPDX-License-Identifier: Apache-2.0
"""Sweeps run by a stand-in for the trainer: results, retries, refusals, added budgets."""

import json
import os

import pytest

from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io.lock import WorkdirLock
from tests.train.sweep_toy import TRAIN, TRAINER, lines, points, toy_config
from train.executors import Local
from train.sweep import run
from train.sweep_config import CosineBaseline, LocalExecutor, RayExecutor, Variant
from train.sweep_plan import make_plan


def toy_run(workdir, config=None, **options):
    return run(config or toy_config(), workdir=workdir, trainer=TRAINER, **options)


def faulty(faults, **changes):
    return toy_config(
        executor=LocalExecutor(environment={"TOY_FAULTS": json.dumps(faults)}), **changes
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder of a sweep that ran through."""
    folder = tmp_path_factory.mktemp("sweep")
    config = toy_config(cosine=CosineBaseline(sizes=("w16",), budgets=(1.5e8,)))
    assert toy_run(folder, config) == 0
    return folder


def by_name(workdir):
    return {(point["size"], point["name"]): point for point in points(workdir)}


def test_results_have_a_point_for_every_job(undisturbed):
    config = toy_config()
    found = by_name(undisturbed)
    assert len(found) == 9
    for job in make_plan(config, undisturbed).jobs.values():
        point = found[tuple(job.name.split("/"))]
        assert point["schedule"] == job.role and point["steps"] == job.steps
        assert point["flops"] == job.total_flops and point["data"] == job.steps * 128
        assert point["params"] == job.config.resolve_model().num_params
        assert 0 < point["loss"] < 1 and point["loss_kind"] == "lm"
        assert (undisturbed / point["workdir"] / "config.yaml").is_file()
    assert found["w16", "w16@1.5e8+cosine"]["schedule"] == "cosine"
    assert found["w16", "w16@3e8"]["budget"] == 3e8
    assert json.loads((undisturbed / "results.json").read_text())["unit"] == "tokens"


def test_finished_jobs_are_left_alone(undisturbed, capsys):
    before = (undisturbed / "results.json").read_bytes()
    config = toy_config(cosine=CosineBaseline(sizes=("w16",), budgets=(1.5e8,)))
    assert toy_run(undisturbed, config) == 0
    assert set(lines(undisturbed, "starts.log").values()) == {1}
    assert (undisturbed / "results.json").read_bytes() == before
    table = capsys.readouterr().out
    assert table == (undisturbed / "status.md").read_text() and "9 done" in table


def test_a_dry_run_prints_costs_and_states_and_writes_nothing(undisturbed, tmp_path, capsys):
    assert toy_run(tmp_path / "new", dry_run=True) == 0
    assert not list(tmp_path.iterdir())
    assert "total of 8 jobs" in capsys.readouterr().out
    toy_run(undisturbed, dry_run=True)
    assert capsys.readouterr().out.count(" done\n") == 8


def test_jobs_share_their_data(undisturbed):
    for folder in (undisturbed / "jobs").glob("*/*"):
        assert (folder / "data").resolve() == (undisturbed / "data").resolve()


def test_crashes_are_tried_again_and_change_nothing(undisturbed, tmp_path):
    config = faulty({"trunk_0000009": [1], "w16@3e8": [-9], "w32@3e8": [75, 75]})
    assert toy_run(tmp_path, config) == 0
    starts = lines(tmp_path, "starts.log")
    assert (starts["trunk_0000009"], starts["w16@3e8"], starts["w32@3e8"]) == (2, 2, 3)
    assert set(lines(tmp_path, "completed.log").values()) == {1}
    found = by_name(undisturbed)
    assert by_name(tmp_path) == {key: found[key] for key in by_name(tmp_path)}


def test_failed_jobs_hold_up_only_what_needs_them(undisturbed, tmp_path):
    config = faulty({"trunk_0000009": [1, 1], "w16@3e8": [2], "w16@1.5e8": [3]})
    assert toy_run(tmp_path, config) == 1
    starts = lines(tmp_path, "starts.log")
    assert (starts["trunk_0000009"], starts["w16@3e8"], starts["w16@1.5e8"]) == (2, 1, 1)
    assert not {"trunk_0000018", "w32@3e8"} & set(starts)
    status = (tmp_path / "status.md").read_text()
    assert "8 jobs: 2 done, 0 running, 3 pending, 3 failed" in status
    assert "exit 2: fault number 1" in status
    assert status.count("waits for w32/trunk_0000009, which failed") == 2
    assert toy_run(tmp_path, config) == 0, "a later start tries again"
    assert points(tmp_path) == [p for p in points(undisturbed) if p["schedule"] != "cosine"]


def test_a_result_without_a_loss_is_a_failure(tmp_path):
    script = "import sys"
    trainer = (TRAINER[0], "-c", script)
    config = toy_config(sizes={"w16": {}}, budgets=(1.5e8,))
    assert run(config, workdir=tmp_path, trainer=trainer) == 1
    assert "ended without a held-out loss" in (tmp_path / "status.md").read_text()


def test_a_loss_that_is_not_finite_is_a_failure(tmp_path):
    script = """
import pathlib, sys
folder = pathlib.Path(sys.argv[3])
(folder / "checkpoints" / "20").mkdir(parents=True)
(folder / "checkpoints" / "20" / "manifest.json").touch()
(folder / "metrics.jsonl").write_text('{"step": 20, "eval/held_out/loss": null}\\n{"ste')
"""
    config = toy_config(sizes={"w16": {}}, budgets=(1.5e8,))
    assert run(config, workdir=tmp_path, trainer=(TRAINER[0], "-c", script)) == 1
    assert "held-out loss of step 20 is not finite" in (tmp_path / "status.md").read_text()
    assert points(tmp_path) == []


def test_budgets_may_be_added_at_any_place(undisturbed, tmp_path):
    small = toy_config(sizes={"w16": {}}, budgets=(1.5e8,))
    assert toy_run(tmp_path, small) == 0
    more = toy_config(budgets=(1.5e8, 3e8))
    assert toy_run(tmp_path, more) == 0
    found = by_name(undisturbed)
    assert by_name(tmp_path) == {key: found[key] for key in by_name(tmp_path)}
    between = toy_config(budgets=(1e8, 1.5e8, 2.2e8, 3e8))
    assert toy_run(tmp_path, between) == 0
    later = by_name(tmp_path)
    assert all(later[key] == value for key, value in found.items() if key in later)
    assert set(lines(tmp_path, "starts.log").values()) == {1} and len(later) == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (3e8,)}, "budgets: 1.5e8 was removed"),
        ({"cooldown": 0.25}, "cooldown: was 0.2, is 0.25"),
        ({"sizes": {"w16": {"seed": 3}}}, "sizes.w16.seed: was null, is 3"),
        ({"train": {**TRAIN, "seed": 4}}, "train.seed: was 0, is 4"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(undisturbed, changes, message):
    before = sorted(undisturbed.rglob("*"))
    with pytest.raises(ConfigError, match="begun with other settings") as caught:
        toy_run(undisturbed, toy_config(**changes))
    assert any(message in line for line in caught.value.problems), caught.value.problems
    assert sorted(undisturbed.rglob("*")) == before


def test_settings_that_change_no_number_may_change(undisturbed):
    config = toy_config(
        train={**TRAIN, "log": {"interval": 3}, "batch_size": 4},
        cosine=CosineBaseline(sizes=("w16",), budgets=(1.5e8,)),
        executor=LocalExecutor(workers=1),
        retries=5,
        variants={"new": Variant(overrides={"schedule.shape": "linear"}, sizes=("w16",))},
    )
    assert toy_run(undisturbed, config, dry_run=True) == 0
    from train.sweep_records import check_folder

    check_folder(config, undisturbed)


def test_a_second_sweep_in_one_folder_is_refused(tmp_path):
    with WorkdirLock(tmp_path), pytest.raises(CheckpointError, match="in use by process"):
        toy_run(tmp_path)


def test_other_resumes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="a sweep always continues"):
        toy_run(tmp_path / "new", resume="never")
    assert not list(tmp_path.iterdir())


def test_jobs_can_be_pinned_to_cores_of_their_own(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    with pytest.raises(ConfigError, match=f"exceed the {len(cores)} cores"):
        Local(LocalExecutor(workers=1, cpus_per_job=len(cores) + 1))
    script = "import os; print('cores', sorted(os.sched_getaffinity(0)))"
    config = toy_config(
        sizes={"w16": {}},
        budgets=(1.5e8,),
        executor=LocalExecutor(workers=1, cpus_per_job=1),
        retries=0,
    )
    run(config, workdir=tmp_path, trainer=(TRAINER[0], "-c", script))
    (log,) = (tmp_path / "jobs").rglob("job.log")
    assert log.read_text() == f"cores {cores[:1]}\n"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (LocalExecutor, {"workers": 0}, "workers=0"),
        (LocalExecutor, {"cpus_per_job": 0}, "cpus_per_job=0"),
        (RayExecutor, {"cpus_per_job": -1.0}, "cpus_per_job=-1.0"),
        (RayExecutor, {"cpus_per_job": 0.0}, "all jobs would start at once"),
        (RayExecutor, {"num_cpus": 2, "address": "auto"}, "needs address: null"),
    ],
)
def test_bad_executors_are_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)
