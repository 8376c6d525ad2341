# SPDX-License-Identifier: Apache-2.0
"""Sweeps run by a stand-in for the trainer: results, retries, refusals, added budgets."""

import json
import os
import shutil
import threading
from dataclasses import replace

import pytest

import train.sweep
from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io.lock import WorkdirLock
from tests.train.sweep_toy import TRAIN, TRAINER, lines, points, toy_config
from train.executors import EXIT_LOST, Local
from train.sweep import run
from train.sweep_config import CosineBaseline, LocalExecutor, Variant
from train.sweep_plan import make_plan
from train.sweep_records import Record, read_record

EMA = {**TRAIN, "ema": 0.9}
COSINE = CosineBaseline(sizes=("w16",), budgets=(1.5e8,))
W32 = {"model": {"config": {"hidden_size": 32}}}


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
    assert toy_run(folder, toy_config(train=EMA, cosine=COSINE)) == 0
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
        assert point["epochs"] == job.steps / 10 and point["body_params"] == job.size.body_params
        assert 0 < point["loss"] < 1 and point["loss_kind"] == "lm"
        assert (undisturbed / point["workdir"] / "config.yaml").is_file()
    assert found["w16", "w16@1.5e8+cosine"]["schedule"] == "cosine"
    assert found["w16", "w16@3e8"]["budget"] == 3e8
    assert json.loads((undisturbed / "results.json").read_text())["unit"] == "tokens"


def test_finished_jobs_are_left_alone(undisturbed, capsys):
    before = (undisturbed / "results.json").read_bytes()
    assert toy_run(undisturbed, toy_config(train=EMA, cosine=COSINE)) == 0
    assert set(lines(undisturbed, "starts.log").values()) == {1}
    assert (undisturbed / "results.json").read_bytes() == before
    table = capsys.readouterr().out
    assert " 2.50 |" in table and " epochs " in table
    assert table == (undisturbed / "status.md").read_text() and "9 done" in table


def test_a_dry_run_prints_costs_and_states_and_writes_nothing(undisturbed, tmp_path, capsys):
    assert toy_run(tmp_path / "new", dry_run=True) == 0
    assert not list(tmp_path.iterdir())
    assert "total of 8 jobs" in capsys.readouterr().out
    toy_run(undisturbed, toy_config(train=EMA, cosine=COSINE), dry_run=True)
    assert capsys.readouterr().out.count(" done\n") == 9
    cores = LocalExecutor(workers=1, cpus_per_job=1000)
    with pytest.raises(ConfigError, match="exceed the"):
        toy_run(tmp_path / "new", toy_config(executor=cores), dry_run=True)


def test_states_of_other_versions_are_read(tmp_path):
    (tmp_path / "state.json").write_text('{"state": "failed", "crashes": 2, "mood": "bad"}')
    assert read_record(tmp_path) == Record("failed", 2)
    (tmp_path / "state.json").write_text("[]")
    assert read_record(tmp_path) == Record()


def test_jobs_share_their_data(undisturbed):
    for folder in (undisturbed / "jobs").glob("*/*"):
        assert (folder / "data").resolve() == (undisturbed / "data").resolve()


def test_crashes_are_tried_again_and_change_nothing(undisturbed, tmp_path):
    config = faulty({"trunk_0000009": [1], "w16@3e8": [-9], "w32@3e8": [75]})
    assert toy_run(tmp_path, config) == 0
    starts = lines(tmp_path, "starts.log")
    assert (starts["trunk_0000009"], starts["w16@3e8"], starts["w32@3e8"]) == (2, 2, 2)
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
        ({"budgets": (3e8,), "cosine": None}, "budgets: 1.5e8 was removed"),
        ({"cooldown": 0.25}, "cooldown: was 0.2, is 0.25"),
        ({"sizes": {"w16": {"seed": 3}, "w32": W32}}, "seed: was 0, is 3 (sizes.w16)"),
        ({"sizes": {"w16": {"ema": None}, "w32": W32}}, "ema: was 0.9, is null (sizes.w16)"),
        ({"sizes": {"w16": {}}}, "sizes.w32 was removed"),
        ({"train": {**EMA, "seed": 4}}, "seed: was 0, is 4 (sizes.w16, sizes.w32)"),
        ({"min_steps": 6}, "was 5..200, is 6..200"),
        ({"cosine": None}, "cosine: was "),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_folder_of_another_sweep_is_refused(undisturbed, changes, message, dry_run):
    before = sorted(undisturbed.rglob("*"))
    settings = {"train": EMA, "cosine": COSINE, **changes}
    with pytest.raises(ConfigError, match="begun with other settings") as caught:
        toy_run(undisturbed, toy_config(**settings), dry_run=dry_run)
    assert any(message in line for line in caught.value.problems), caught.value.problems
    assert sorted(undisturbed.rglob("*")) == before


def test_settings_that_change_no_number_may_change(undisturbed):
    config = toy_config(
        train={**EMA, "log": {"interval": 3}, "checkpoint": {"keep": 1}},
        sizes={"w16": {}, "w32": {"model.config.hidden_size": 32}},  # as before, spelled otherwise
        cosine=COSINE,
        executor=LocalExecutor(workers=1),
        retries=5,
        max_steps=300,
        epoch_size=10,
        variants={"new": Variant(overrides={"schedule.shape": "linear"}, sizes=("w16",))},
    )
    assert toy_run(undisturbed, config, dry_run=True) == 0
    assert config.train != toy_config(train=EMA).train


def test_a_folder_that_lost_its_settings_is_refused(undisturbed, tmp_path):
    for name in ("results", "damaged"):
        shutil.copytree(undisturbed, tmp_path / name, symlinks=True)
    (tmp_path / "results" / "sweep.json").unlink()
    with pytest.raises(ConfigError, match=r"has results and no sweep\.json"):
        toy_run(tmp_path / "results", toy_config(cooldown=0.3))
    (tmp_path / "damaged" / "sweep.json").write_text('{"kind"')
    with pytest.raises(ConfigError, match="bring it back from a copy"):
        toy_run(tmp_path / "damaged")


def test_a_second_sweep_in_one_folder_is_refused(tmp_path):
    with WorkdirLock(tmp_path), pytest.raises(CheckpointError, match="in use by process"):
        toy_run(tmp_path)


def test_results_of_other_lengths_are_refused(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "sweep", symlinks=True)
    path = tmp_path / "sweep" / "jobs" / "w16" / "w16@3e8" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 7}))
    with pytest.raises(ConfigError, match="has the result of 7 steps and the plan is 50"):
        toy_run(tmp_path / "sweep", toy_config(train=EMA, cosine=COSINE))


def test_other_resumes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="a sweep always continues"):
        toy_run(tmp_path / "new", resume="never")
    assert not list(tmp_path.iterdir())


def one_job(script, tmp_path, **changes):
    """Run a sweep of two jobs by a script; return its code and status."""
    config = toy_config(sizes={"w16": {}}, budgets=(1.5e8,), **changes)
    code = run(config, workdir=tmp_path, trainer=(TRAINER[0], "-c", script))
    return code, (tmp_path / "status.md").read_text()


def test_preempted_jobs_count_as_crashes_unless_they_went_on(tmp_path):
    code, status = one_job("import sys; sys.exit(75)", tmp_path / "never", retries=1)
    assert code == 1 and "1 failed" in status and "exit 75" in status
    script = """
import pathlib, sys
folder = pathlib.Path(sys.argv[3]) / "checkpoints"
step = len(list(folder.glob("*"))) + 1
(folder / str(step)).mkdir(parents=True)
(folder / str(step) / "manifest.json").touch()
sys.exit(75 if step < 5 else 1)
"""
    code, status = one_job(script, tmp_path / "slowly", retries=0)
    assert code == 1 and "exit 1" in status
    steps = tmp_path / "slowly" / "jobs" / "w16" / "trunk_0000020" / "checkpoints"
    assert len(list(steps.iterdir())) == 5


def test_a_job_waits_for_the_lock_of_its_folder(undisturbed, tmp_path):
    """A process of a lost machine may still save there; its job must not burn its retries."""
    lock = WorkdirLock(tmp_path / "jobs" / "w16" / "trunk_0000020").acquire()
    release = threading.Timer(1.0, lock.release)
    release.start()
    assert toy_run(tmp_path, toy_config(retries=0)) == 0
    assert not release.is_alive() and set(lines(tmp_path, "starts.log").values()) == {1}
    assert "w16/trunk_0000020 waits: folder" in (tmp_path / "sweep.log").read_text()
    found = by_name(undisturbed)
    assert by_name(tmp_path) == {key: found[key] for key in by_name(tmp_path)}


def test_a_lock_that_nobody_gives_up_fails_its_job_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(train.sweep, "_ORPHAN_SECONDS", 0.1)
    with WorkdirLock(tmp_path / "jobs" / "w16" / "trunk_0000020"):
        assert toy_run(tmp_path, toy_config(budgets=(1.5e8,))) == 1
    status = (tmp_path / "status.md").read_text()
    assert "2 done, 0 running, 1 pending, 1 failed" in status and "is in use by process" in status


class Losing(Local):
    """Loses the machines of the first jobs that end."""

    losses = 3

    def poll(self):
        ended = super().poll()
        lost = min(self.losses, len(ended))
        self.losses -= lost
        return [(name, EXIT_LOST) for name, _ in ended[:lost]] + ended[lost:]


def test_lost_machines_are_no_crashes_of_their_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(train.sweep, "make_executor", Losing)
    script = "import sys; sys.exit(1)"
    code, status = one_job(script, tmp_path, retries=0)
    log = (tmp_path / "sweep.log").read_text()
    assert code == 1 and "exit 1" in status and log.count("was lost") == 3
    monkeypatch.setattr(train.sweep, "_MOST_LOST", 2)
    monkeypatch.setattr(Losing, "losses", 100)
    code, status = one_job(script, tmp_path / "always", retries=0)
    assert code == 1 and "its worker or machine was lost" in status


class Crowded(Local):
    """Has room only now and then, as a cluster whose machines come and go."""

    asked = 0

    @property
    def free(self):
        self.asked += 1
        return self.asked % 4 == 0 and super().free


def test_a_sweep_waits_for_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(train.sweep, "make_executor", Crowded)
    assert toy_run(tmp_path, toy_config(sizes={"w16": {}}, budgets=(1.5e8,))) == 0


def test_a_damaged_trunk_is_named_with_its_remedy(tmp_path):
    config = toy_config(sizes={"w16": {}}, budgets=(1.5e8,), retries=0)
    faults = faulty({"w16@1.5e8": [1, 1]}, sizes=config.sizes, budgets=config.budgets)
    assert toy_run(tmp_path, replace(faults, retries=0)) == 1
    assert "damaged" not in (tmp_path / "status.md").read_text()
    trunk = tmp_path / "jobs" / "w16" / "trunk_0000020"
    (trunk / "checkpoints" / "20" / "state").write_text("flipped")
    assert toy_run(tmp_path, replace(faults, retries=0)) == 1
    wanted = f"the checkpoint of w16/trunk_0000020 is damaged; delete {trunk} to train it again"
    assert wanted in (tmp_path / "status.md").read_text()
    shutil.rmtree(trunk)
    assert toy_run(tmp_path, config) == 0


def test_a_copied_folder_may_have_data_of_its_own(tmp_path):
    (tmp_path / "jobs" / "w16" / "trunk_0000020" / "data").mkdir(parents=True)
    assert toy_run(tmp_path, toy_config(sizes={"w16": {}}, budgets=(1.5e8,))) == 0


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
