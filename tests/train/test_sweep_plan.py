# SPDX-License-Identifier: Apache-2.0
"""Plans of sweeps: steps from FLOPs, trunks shared by branches, costs, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from sqzjax import cli
from sqzjax import config as configs
from sqzjax.analysis import training_flops
from sqzjax.errors import ConfigError
from tests.tolerances import TWO_DIGITS
from tests.train.sweep_toy import TRAIN, toy_config
from train.__main__ import PROGRAM
from train.sweep_config import CosineBaseline, SweepConfig, Variant, number_name
from train.sweep_plan import cost_table, loss_kind, make_plan

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("folder")


def by_role(plan, role):
    return [job for job in plan.jobs.values() if job.role == role]


def test_steps_are_the_budget_over_the_cost_of_a_step():
    config = toy_config()
    plan = make_plan(config, FOLDER)
    for job in by_role(plan, "cooldown"):
        assert job.budget is not None
        model = job.config.resolve_model()
        step = training_flops(model, 4, 32)
        assert job.steps == round(job.budget / step)
        assert job.total_flops == pytest.approx(job.steps * step)
        assert job.steps - job.start == int(0.2 * job.steps)
        assert job.name == f"{job.size.name}/{job.size.name}@{number_name(job.budget)}"
        assert job.size.counted_params == model.num_params - 2 * 260 * model.hidden_size
    assert len(by_role(plan, "cooldown")) == 4 and not plan.skipped and plan.unit == "tokens"


def test_each_size_has_one_trunk_cut_at_its_branches():
    plan = make_plan(toy_config(), FOLDER)
    for size in ("w16", "w32"):
        cooled = [job for job in by_role(plan, "cooldown") if job.size.name == size]
        trunk = sorted(
            (job for job in by_role(plan, "trunk") if job.size.name == size),
            key=lambda job: job.steps,
        )
        assert [job.start for job in trunk] == [0, *(job.steps for job in trunk[:-1])]
        assert [job.needs for job in trunk] == [None, *(job.name for job in trunk[:-1])]
        assert {job.steps for job in trunk} == {job.start for job in cooled}
        for job in (*cooled, *trunk[1:]):
            branch, source = job.config.branch, plan.jobs[job.needs]
            assert branch.step == source.steps == job.start
            assert Path(branch.run) == FOLDER.absolute() / "jobs" / source.name
        assert all(job.config.schedule.cooldown == 0.2 for job in cooled)
        assert all(job.config.schedule.cooldown == 0.0 for job in trunk)


def test_jobs_come_after_what_they_need_and_long_chains_first():
    plan = make_plan(toy_config(), FOLDER)
    names = list(plan.jobs)
    for job in plan.jobs.values():
        assert job.needs is None or names.index(job.needs) < names.index(job.name)
    assert all(job.needs is None for job in list(plan.jobs.values())[:2])


def test_variants_and_cosine_share_the_steps():
    config = toy_config(
        variants={"fast": Variant(overrides={"schedule.shape": "linear"}, sizes=("w16",))},
        cosine=CosineBaseline(budgets=(3e8,)),
    )
    plan = make_plan(config, FOLDER)
    plain = plan.jobs["w16/w16@3e8"]
    fast = plan.jobs["w16/w16@3e8+fast"]
    cosine = plan.jobs["w16/w16@3e8+cosine"]
    assert (fast.needs, fast.steps, fast.variant) == (plain.needs, plain.steps, "fast")
    assert fast.config == replace(
        plain.config, schedule=replace(plain.config.schedule, shape="linear")
    )
    assert cosine.needs is None and cosine.config.branch is None
    assert cosine.steps == plain.steps and cosine.flops == pytest.approx(plain.total_flops)
    assert cosine.config.schedule.kind == "cosine" and cosine.config.schedule.warmup_steps == 4
    assert len(by_role(plan, "cosine")) == 2 and "w32/w32@3e8+fast" not in plan.jobs


def test_the_whole_costs_the_longest_trunk_and_the_cooldowns():
    config = toy_config(flops_per_second=1e8, epoch_size=1000)
    plan = make_plan(config, FOLDER)
    total = 0.0
    for size in ("w16", "w32"):
        cooled = [job for job in by_role(plan, "cooldown") if job.size.name == size]
        total += max(job.start for job in cooled) * cooled[0].size.flops
        total += sum(int(0.2 * job.steps) * job.size.flops for job in cooled)
    assert sum(job.flops for job in plan.jobs.values()) == pytest.approx(total)
    table = cost_table(config, plan, {"w16/w16@3e8": "done"})
    assert f"{total:.3e}" in table and "total of 8 jobs" in table
    row = next(line.split() for line in table.splitlines() if line.startswith("w16/w16@3e8"))
    job = plan.jobs["w16/w16@3e8"]
    assert "still to do: 7  " in table and f"{total - job.flops:.3e}" in table
    assert row[1:3] == [f"{job.start}", f"{job.steps}"] and row[-1] == "done"
    assert row[5] == f"{job.steps * 128 / 1000:.2f}"


def test_pairs_out_of_range_are_left_out_with_a_warning():
    plan = make_plan(toy_config(min_steps=20, max_steps=45), FOLDER)
    reasons = {(s.size, s.budget): s.reason for s in plan.skipped}
    assert "above max_steps=45" in reasons["w16", 3e8]
    assert "below min_steps=20" in reasons["w32", 1.5e8]
    assert {job.size.name for job in plan.points(1.5e8)} == {"w16"}
    warnings = plan.warnings((1.5e8, 3e8))
    assert "1.5e8 has 1 of at least 3 sizes (w16)" in warnings[0]
    assert "left out:" in cost_table(toy_config(), plan, {})
    with pytest.raises(ConfigError, match="no pair of size and budget is left"):
        make_plan(toy_config(min_steps=150, max_steps=160), FOLDER)


def test_added_sizes_and_budgets_change_no_job():
    before = make_plan(toy_config(), FOLDER).jobs
    sizes = {**toy_config().sizes, "w40": {"model.config.hidden_size": 40}}
    after = make_plan(toy_config(sizes=sizes, budgets=(1.5e8, 2e8, 3e8, 5e8)), FOLDER).jobs
    for name, job in before.items():
        found = after[name]
        if job.role == "trunk":  # may start from a checkpoint in between
            assert replace(found.config, branch=None) == replace(job.config, branch=None)
        else:
            assert found == job
    assert len(after) > len(before)


def test_equal_branch_points_share_a_trunk():
    near = toy_config(budgets=(3e8, 3.001e8))
    plan = make_plan(near, FOLDER)
    assert len(by_role(plan, "trunk")) == 2 and len(by_role(plan, "cooldown")) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": {}}, "at least one size"),
        ({"sizes": {"a/b": {}}}, "'a/b' must be letters"),
        ({"sizes": {"a": {"steps": 3}}}, "sizes.a.steps: the sweep sets it"),
        ({"sizes": {"a": {"schedule": {"cooldown": 0.1}}}}, "sizes.a.schedule.cooldown"),
        ({"budgets": ()}, "at least one"),
        ({"budgets": (1e8, 1e8)}, "must be different"),
        ({"budgets": (float("nan"),)}, r"budgets=\[nan\] must be numbers"),
        ({"budgets": (1e8, float("inf"))}, r"inf\] must be numbers"),
        ({"sizes": {"a": {"eval.interval": 0}}}, "sizes.a.eval.interval: all jobs share it"),
        ({"sizes": {"a": {"eval": {"batches": 2}}}}, "sizes.a.eval: all jobs share it"),
        ({"sizes": {"a": {"export": True}}}, "sizes.a.export: all jobs share it"),
        ({"variants": {"a": Variant(overrides={"eval.batches": 2})}}, "all jobs share it"),
        ({"variants": {"a": Variant(overrides={"data.eval_fraction": 0.2})}}, "all jobs share it"),
        ({"variants": {"a": Variant(overrides={"schedule.learning_rate": 1.0})}}, "trunk's"),
        ({"variants": {"a": Variant(overrides={"schedule": {"warmup_steps": 1}})}}, "trunk's"),
        ({"cooldown": 0.0}, r"cooldown=0.0 must lie in \(0, 1\)"),
        ({"min_steps": 300}, "max_steps=200"),
        ({"min_steps": 4}, "is no step"),
        ({"retries": -1}, "retries=-1"),
        ({"flops_per_second": 0.0}, "flops_per_second=0.0"),
        ({"variants": {"cosine": Variant()}}, "name other jobs"),
        ({"variants": {"a": Variant(overrides={"model.config.hidden_size": 8})}}, "trunk's"),
        ({"variants": {"a": Variant(overrides={"schedule": {"kind": "wsd"}})}}, "trunk's"),
        ({"variants": {"a": Variant(sizes=("w1",))}}, "'w1' is none of the sweep's sizes"),
        ({"cosine": CosineBaseline(budgets=(7.0,))}, "7.0 is none of the sweep's budgets"),
    ],
)
def test_bad_sweeps_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        toy_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": {"kind": "wsd"}}, "kind='wsd' must be continual"),
        ({"schedule": {**TRAIN["schedule"], "cooldown": 0.1}}, "must be null"),
        ({"schedule": {**TRAIN["schedule"], "warmup_steps": 5}}, "warmup_steps=5 must end before"),
        ({"eval": {"interval": 0}}, "held-out loss"),
        ({"export": True}, "train.export"),
        ({"batch_size": 0}, "train: .*batch_size=0 must be >= 1"),
        ({"stps": 3}, "train: stps: unknown key"),
    ],
)
def test_bad_training_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        toy_config(train={**TRAIN, **changes})
    with pytest.raises(ConfigError, match="must be a mapping"):
        toy_config(train="file.yaml")


def test_what_follows_from_a_width_follows_its_override():
    plan = make_plan(toy_config(), FOLDER)
    heads = {job.size.name: job.config.resolve_model().head_dim for job in plan.jobs.values()}
    assert heads == {"w16": 8, "w32": 16}


def test_every_bad_size_is_reported():
    sizes = {
        "good": {},
        "heads": {"model.config.hidden_size": 17},
        "typo": {"model.config.hiden_size": 16},
        "long": {"seq_len": 1 << 30},
        "warm": {"schedule.warmup_steps": 5},
    }
    with pytest.raises(ConfigError) as caught:
        make_plan(toy_config(sizes=sizes), FOLDER)
    found = "\n".join(caught.value.problems)
    for text in (
        "sizes.heads: ",
        "sizes.typo: ",
        "hiden_size",
        "sizes.long: ",
        "sizes.warm.schedule",
    ):
        assert text in found
    assert "sizes.good" not in found


def test_a_variant_costs_what_its_own_objective_does():
    """A cooldown of block diffusion with complementary views takes twice as much."""
    model = {**TRAIN["model"], "config": {**TRAIN["model"]["config"], "mask": "block_causal"}}
    model["config"] |= {"block_size": 8, "tokens": {"mask": 259}}
    train = {**TRAIN, "model": model, "objective": {"kind": "block_diffusion"}}
    both = Variant(overrides={"objective.complementary": True})
    plan = make_plan(toy_config(train=train, budgets=(1e9,), variants={"both": both}), FOLDER)
    plain, double = plan.jobs["w16/w16@1e9"], plan.jobs["w16/w16@1e9+both"]
    assert plain.step_flops == plain.size.flops and double.flops == 2 * plain.flops
    assert double.total_flops == plain.total_flops + plain.flops


def test_names_of_numbers():
    assert [number_name(x) for x in (1e12, 2.5e17, 3.0, 123456.0)] == [
        "1e12",
        "2.5e17",
        "3e0",
        "1.23456e5",
    ]


def test_a_config_file_takes_its_training_from_another(tmp_path):
    base = configs.to_dict(toy_config())
    (tmp_path / "train.yaml").write_text(configs.dump(base.pop("train")))
    (tmp_path / "sweep.yaml").write_text(
        configs.dump({**base, "train": {"base": "train.yaml", "seed": 5}})
    )
    overrides = ["budgets=[1e8]", "train.batch_size=2"]
    found = configs.load(SweepConfig, tmp_path / "sweep.yaml", overrides)
    assert found.base == replace(toy_config().base, seed=5, batch_size=2)
    assert found.budgets == (1e8,)
    assert configs.load(SweepConfig, configs.to_dict(found)) == found


SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_config_file_dry_runs_and_writes_nothing(path, tmp_path, capsys):
    assert cli.main(PROGRAM, [str(path), "--dry-run", "--workdir", str(tmp_path / "work")]) == 0
    assert "core time" in capsys.readouterr().out and not list(tmp_path.iterdir())
    config = configs.load(SweepConfig, path)
    assert not make_plan(config, FOLDER).warnings(config.budgets)


# Forward TFLOP of a sample, and millions of parameters of the published points of a budget.
FORWARD = {3.12: 0.461, 6.91: 0.994, 15.08: 2.100, 26.40: 3.613, 38.99: 5.340, 60.54: 8.201}
FORWARD |= {86.80: 11.67, 115.13: 15.49, 153.49: 20.45, 203.84: 27.17, 304.53: 40.59, 456.75: 60.31}
PUBLISHED = {
    6e17: (3.12, 38.99),
    1e18: (6.91, 38.99),
    3e18: (15.08, 86.80),
    6e18: (15.08, 153.49),
    1e19: (15.08, 203.84),
    3e19: (38.99, 456.75),
    6e19: (86.80, 456.75),
}


def test_the_era5_sweep_is_the_published_one():
    plan = make_plan(configs.load(SweepConfig, ROOT / "configs/sweeps/weather_era5.yaml"), FOLDER)
    for budget, (least, most) in PUBLISHED.items():
        jobs = {round(job.size.counted_params / 1e6, 2): job for job in plan.points(budget)}
        wanted = [size for size in FORWARD if least <= size <= most]
        assert set(wanted) <= set(jobs), budget
        for size in set(jobs) & set(FORWARD):
            job = jobs[size]
            steps = budget / (3 * 16 * FORWARD[size] * 1e12)
            assert job.steps == pytest.approx(steps, rel=TWO_DIGITS)
            assert job.steps - job.start == int(0.05 * job.steps)
    assert plan.unit == "samples"


def test_longer_forecasts_cost_more_and_have_a_loss_of_their_own():
    path = ROOT / "configs" / "sweeps" / "weather_tiny.yaml"
    plan = make_plan(configs.load(SweepConfig, path), FOLDER)
    plain = plan.jobs["e64_d4/e64_d4@2.7e12"]
    amse = plan.jobs["e64_d4/e64_d4@2.7e12+amse"]
    rollout = plan.jobs["e64_d4/e64_d4@2.7e12+rollout"]
    assert rollout.flops == pytest.approx(4 * plain.flops) and amse.flops == plain.flops
    assert rollout.total_flops - plain.total_flops == pytest.approx(3 * plain.flops)
    kinds = [loss_kind(job) for job in (plain, amse, rollout)]
    assert kinds == ["mse", "amse", "mse, 4 steps"]
    assert plain.needs == amse.needs == rollout.needs
