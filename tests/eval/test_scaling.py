# SPDX-License-Identifier: Apache-2.0
"""Scaling reports: which runs may be fitted together, what is refused, records and pages."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval import (
    scaling,
    scaling_fits,
    scaling_plots,
    scaling_points,
    scaling_report,
    scaling_tables,
)
from eval.__main__ import PROGRAM
from eval.scaling_config import Bootstrap, ScalingConfig, Target
from sqzjax.analysis.scaling_laws import isoflop
from sqzjax.analysis.scaling_parametric import ParametricLaw
from sqzjax.cli import main
from sqzjax.errors import DataError
from tests import tolerances

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = str(ROOT / "eval/data/weather_isoflop.json")
LAW = ParametricLaw(E=0.3, A=60.0, B=90.0, alpha=0.4, beta=0.35)
QUICK = Bootstrap(resamples=100, akima_resamples=100)


def point(size, budget, *, schedule="cooldown", loss_kind="mse", loss=None, noise=0.0):
    data = budget / 6 / size
    value = float(LAW(size, data)) * np.exp(noise) if loss is None else loss
    name = f"s{size:.3g}@{budget:.3g}"
    row = {"name": name, "size": f"s{size:.3g}", "params": size, "counted_params": size * 0.9}
    row |= {"budget": budget, "flops": budget, "data": data, "epochs": 0.5, "steps": 100}
    return row | {"loss": value, "loss_kind": loss_kind, "schedule": schedule, "workdir": "w"}


def sweep(budgets=(1e15, 1e16, 1e17, 1e18), sizes=7):
    """Runs about the best size of each budget, with a noise that alternates."""
    generator = np.random.default_rng(0)
    rows = []
    for budget in budgets:
        best = float(LAW.optimum(budget)[0])
        for size in best * np.geomspace(1 / 4, 4, sizes):
            rows.append(point(float(size), budget, noise=0.001 * generator.standard_normal()))
    return rows


def written(folder, points, **extra):
    path = folder / "results.json"
    document = {"version": 1, "unit": "tokens", "points": points, **extra}
    path.write_text(json.dumps(document))
    return str(path)


def fitted(folder, points, **settings):
    settings = {"bootstrap": QUICK, "parametric": False} | settings
    config = ScalingConfig(points=written(folder, points), **settings)
    return scaling.fit(config, scaling_points.read(config))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    config = ScalingConfig(
        points=PUBLISHED,
        schedule="cooldown",
        bootstrap=QUICK,
        targets=(Target(flops=2.27e21, loss=0.0053, size=1.31e9),),
    )
    return scaling.run_scaling(config, folder), folder


def test_the_published_points_give_the_published_laws(published):
    first, final, _ = published[0]["laws"]
    assert (first["size"]["coefficient"], first["size"]["exponent"]) == pytest.approx(
        (2.2252e-4, 0.598), rel=tolerances.FOUR_DIGITS
    )
    assert (first["loss"]["coefficient"], first["loss"]["exponent"]) == pytest.approx(
        (12.33, -0.168), rel=tolerances.THREE_DIGITS
    )
    assert final["size"]["exponent"] == pytest.approx(0.584, rel=tolerances.THREE_DIGITS)
    bent = final["saturating"]
    assert (bent["floor"], bent["coefficient"], bent["exponent"]) == pytest.approx(
        (0.00506, 0.00702, 0.418), rel=tolerances.THREE_DIGITS
    )
    low, high = final["targets"][0]["saturating_interval"]
    assert low < 0.0053 < high
    assert final["targets"][0]["loss_interval"][1] < 0.003  # the pure power law is far off


def test_counted_flops_are_three_percent_more_than_6nd(published):
    rows = {row["size"]: row["ratios"] for row in published[0]["six_nd"]}
    assert rows["e1024_d16"]["counted_params"] == pytest.approx(1.03, rel=tolerances.THREE_DIGITS)


def test_every_file_of_the_report_is_written(published):
    record, folder = published
    names = {path.name for path in folder.iterdir()}
    drawn = {f"{name}.svg" for name in ("isoflop", "laws", "parametric", "residuals")}
    assert names == {"scaling.json", "table.md", "report.html"} | drawn
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 4 and "nan" not in page.lower()
    stored = json.loads((folder / "scaling.json").read_text())
    law = stored["laws"][0]["size"]["exponent"]
    assert law == pytest.approx(record["laws"][0]["size"]["exponent"], rel=1e-6)
    assert scaling_report.markdown(stored).startswith("# Scaling laws\n")
    assert "0.005057 + 0.007029 (C/1e18)^-0.4" in (folder / "table.md").read_text()


def test_the_committed_record_is_that_of_the_committed_points(published):
    committed = json.loads((ROOT / "eval/results/scaling_published.json").read_text())
    for mine, theirs in zip(published[0]["laws"][:2], committed["laws"]):
        for name in ("size", "loss"):
            assert mine[name]["exponent"] == pytest.approx(theirs[name]["exponent"], rel=1e-6)
    for name in ("E", "alpha", "beta"):
        assert published[0]["parametric"][name] == pytest.approx(
            committed["parametric"][name], rel=tolerances.NORMAL_EQUATIONS
        )
    assert scaling_report.render(committed, scaling_plots.drawings(committed))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"schedule": "trunk"}, r"mix schedules \['cooldown', 'trunk'\]"),
        ({"loss_kind": "amse"}, r"mix loss_kinds \['amse', 'mse'\]"),
    ],
)
def test_losses_that_do_not_compare_are_never_mixed(tmp_path, other, message):
    rows = [*sweep(), point(1e6, 1e16, **other, loss=9.0)]
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, rows)
    record = fitted(tmp_path, rows, schedule="cooldown", loss_kind="mse")
    assert record["runs"]["count"] == len(rows) - 1
    assert record["runs"]["left_out"]["other schedules or losses"] == 1


def test_a_schedule_that_no_run_has_is_named(tmp_path):
    with pytest.raises(DataError, match=r"schedule='cosine'; there are \['cooldown'\]"):
        fitted(tmp_path, sweep(), schedule="cosine")


def test_a_planted_law_is_found_and_held_out_budgets_are_predicted(tmp_path):
    record = fitted(tmp_path, sweep(), parametric=True, held_out=1, targets=(Target(flops=1e20),))
    law = record["laws"][0]
    low, high = law["size"]["exponent_interval"]
    assert low - 0.01 < LAW.size_exponent < high + 0.01  # parabolas are not quite that law
    fit = record["parametric"]
    assert fit["converged"]
    for name in ("E", "alpha", "beta"):
        assert fit[name] == pytest.approx(getattr(LAW, name), rel=tolerances.TWO_DIGITS)
        low, high = fit["intervals"][name]
        assert low < fit[name] < high
    held = record["held_out"][0]
    assert held["budget"] == 1e18
    assert abs(held["saturating"] / held["loss"] - 1) < abs(held["power_law"] / held["loss"] - 1)
    assert held["parametric"] == pytest.approx(held["loss"], rel=tolerances.THREE_DIGITS)
    size, data = LAW.optimum(1e20)
    assert fit["targets"][0]["size"] == pytest.approx(size, rel=tolerances.NOISE_ESTIMATE)
    assert fit["targets"][0]["loss"] == pytest.approx(LAW(size, data), rel=tolerances.TWO_DIGITS)


def test_nothing_beyond_a_held_out_budget_predicts_it(tmp_path, monkeypatch):
    beyond = [point(1e6, 1e19), point(2e6, 1e19)]  # refused as a budget, but runs all the same
    config = ScalingConfig(points=written(tmp_path, sweep() + beyond), bootstrap=QUICK)
    runs = scaling_points.read(config)
    iso = isoflop(runs.budget, runs.sizes["params"], runs.loss)
    fitted_to = []
    fit = scaling_fits.fit_parametric
    monkeypatch.setattr(
        scaling_fits, "fit_parametric", lambda *columns: fitted_to.append(columns) or fit(*columns)
    )
    assert scaling_fits.held_out_record(config, runs, iso)[0]["budget"] == 1e18
    ((size, data, _),) = fitted_to
    assert 6 * (size * data).max() == pytest.approx(1e17, rel=tolerances.FLOAT64_REL)


def test_budgets_that_runs_did_not_keep_are_fitted_at_what_they_took(tmp_path):
    """Cooldowns on rollouts cost more than the steps of a trunk that budgets are made for."""
    nominal = [row | {"budget": row["budget"] / 1.6} for row in sweep()]
    record, true = fitted(tmp_path, nominal), fitted(tmp_path, sweep())
    law = true["laws"][0]["size"]
    assert record["laws"][0]["size"]["coefficient"] == pytest.approx(
        law["coefficient"], rel=tolerances.NORMAL_EQUATIONS
    )
    assert "budget of 6.25e+17 FLOPs took 1e+18" in " ".join(record["warnings"])
    near = [row | {"budget": row["budget"] / 1.01} for row in sweep()]
    record = fitted(tmp_path, near)
    assert not record["runs"]["moved"] and not true["runs"]["moved"]
    assert record["runs"]["points"][0]["budget"] == 1e15 / 1.01


def test_runs_without_a_loss_are_left_out_of_all_tables(tmp_path):
    cooled, trunk = sweep(), point(3e6, 1e16, schedule="trunk", loss=1.0) | {"workdir": "t"}
    rows = [row | {"trunk": "t"} for row in cooled[:8]] + cooled[8:]
    rows[0]["loss"] = None
    record = fitted(tmp_path, [*rows, trunk], schedule="cooldown")
    assert len(record["schedules"]) == 7 and "## Cooldowns" in scaling_report.markdown(record)
    record = fitted(tmp_path, [*rows, trunk | {"loss": None}], schedule="cooldown")
    assert not record["schedules"] and "## Cooldowns" not in scaling_report.markdown(record)


@pytest.mark.parametrize(
    ("name", "value"), [("data", 0.0), ("flops", -1e16), ("budget", "much"), ("loss", -0.5)]
)
def test_points_that_no_fit_can_use_are_named(tmp_path, name, value):
    rows = sweep()
    rows[3] |= {name: value}
    told = re.escape(f"the point {rows[3]['name']} has {name}={value}, which")
    with pytest.raises(DataError, match=told):
        fitted(tmp_path, rows)


def test_what_a_reader_should_not_overlook_is_said(tmp_path, monkeypatch):
    fit = scaling_fits.fit_parametric
    monkeypatch.setattr(
        scaling_fits, "fit_parametric", lambda *c: fit(*c)._replace(converged=False)
    )
    rows = [row | {"epochs": 5.0} for row in sweep(sizes=5)]
    few = Bootstrap(resamples=100, akima_resamples=100, scheme="runs")
    record = fitted(tmp_path, rows, bootstrap=few, parametric=True, held_out=9)
    said = "\n".join(record["warnings"])
    for text in (
        "did not converge",
        "% of the resamples have no minimum",
        "see their data 5.0 times",
        "Only 2 of held_out=9 budgets",
    ):
        assert text in said and text in scaling_report.markdown(record)


def test_parabolas_of_ln_l_reach_the_report(tmp_path):
    record = fitted(tmp_path, sweep(), log_loss=True)
    plain = fitted(tmp_path, sweep())
    logs, levels = (one["isoflop"]["optima"][0] for one in (record, plain))
    assert logs["loss"] == pytest.approx(levels["loss"], rel=tolerances.TWO_DIGITS)
    best = np.exp(np.polyval(logs["coefficients"], np.log(logs["size"])))
    assert best == pytest.approx(logs["loss"], rel=tolerances.NORMAL_EQUATIONS)
    assert scaling_plots.residuals(record) != scaling_plots.residuals(plain)
    assert "## Laws of compute" in scaling_report.markdown(record)


def test_a_refused_budget_is_told_and_the_rest_is_fitted(tmp_path):
    rows = sweep()[:-3]  # of the largest budget the sizes up to the best one
    rows += [point(1e6, 1e19), point(2e6, 1e19)]
    record = fitted(tmp_path, rows)
    reasons = {one["budget"]: one["reason"] for one in record["isoflop"]["refusals"]}
    assert set(reasons) == {1e18, 1e19} and "fewer than 3 sizes" in reasons[1e19]
    assert "add sizes" in reasons[1e18]
    assert len(record["isoflop"]["optima"]) == 3
    assert sum("is refused" in line for line in record["warnings"]) == 2
    assert "(refused)" not in scaling_report.markdown(record)
    assert "refused: fewer than 3 sizes" in scaling_report.markdown(record)
    assert scaling_report.render(record, scaling_plots.drawings(record))


def test_too_few_good_budgets_are_an_error(tmp_path):
    with pytest.raises(DataError, match="a law needs two"):
        fitted(tmp_path, sweep(budgets=(1e16,)))


def test_few_decades_are_a_warning(tmp_path):
    record = fitted(tmp_path, sweep(budgets=(1e16, 3e16, 1e17)))
    assert any("1.00 decades" in line for line in record["warnings"])
    assert not any("decades" in line for line in fitted(tmp_path, sweep())["warnings"])


def test_three_sizes_a_budget_fit_without_intervals(tmp_path):
    record = fitted(tmp_path, sweep(sizes=3))
    assert record["laws"][0]["size"]["exponent_interval"] is None and len(record["laws"]) == 1
    assert scaling_report.render(record, scaling_plots.drawings(record))


def test_samples_of_unknown_tokens_use_the_counted_flops(tmp_path):
    rows = [row | {"data": row["data"] / 512} for row in sweep()]
    config = ScalingConfig(
        points=written(tmp_path, rows, unit="samples"),
        bootstrap=QUICK,
        targets=(Target(flops=1e20),),
    )
    fit = scaling.fit(config, scaling_points.read(config))["parametric"]
    assert fit["flops_per_pair"] == pytest.approx(6 * 512, rel=tolerances.FLOAT64_REL)
    assert fit["targets"][0]["size"] == pytest.approx(
        LAW.optimum(1e20)[0], rel=tolerances.NOISE_ESTIMATE
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "no JSON file of runs"),
        ('{"version": 2, "points": []}', "version 1"),
        ('{"version": 1, "unit": "tokens", "points": []}', "no points"),
        ('{"version": 1, "unit": "tokens", "points": [{"name": "a"}]}', "lacks 'schedule'"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        scaling_points.read(ScalingConfig(points=str(path)))
    with pytest.raises(DataError, match="does not exist"):
        scaling_points.read(ScalingConfig(points=str(tmp_path / "none.json")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": -1}, "held_out=-1"),
        ({"tokens_per_sample": 0.0}, "tokens_per_sample"),
        ({"tokens_per_sample": float("inf")}, "tokens_per_sample=inf"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ScalingConfig(points="x", **settings)
    with pytest.raises(ValueError, match="resamples=3"):
        Bootstrap(resamples=3)
    with pytest.raises(ValueError, match="noise=nan"):
        Bootstrap(noise=float("nan"))
    for target in ({"flops": 0}, {"flops": float("inf")}, {"loss": -1.0}, {"size": -2.0}):
        ((name, value),) = target.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            Target(**{"flops": 1e20, **target})


def test_points_of_diverged_runs_are_left_out_and_counted(tmp_path):
    rows = sweep()
    rows[3]["loss"] = None
    record = fitted(tmp_path, rows)
    assert record["runs"]["left_out"]["without a finite loss"] == 1


def test_numbers_are_written_with_their_unit():
    assert scaling_tables.count(1.234e9) == "1.234 B" and scaling_tables.count(999) == "999"
    assert scaling_tables.count(None) == "-" and scaling_tables.number(2e21) == "2e21"
    assert scaling_tables.span((1e6, 2e6), scaling_tables.count) == "1 M to 2 M"


def test_the_command_line_writes_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    points = written(tmp_path, sweep())
    arguments = ["configs/eval/scaling.yaml", f"points={points}", "bootstrap.resamples=50"]
    assert main(PROGRAM, [*arguments, "--workdir", str(tmp_path / "out")]) == 0
    assert "## Laws of compute" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()
    missing = ["configs/eval/scaling.yaml", "points=nowhere.json"]
    assert main(PROGRAM, [*missing, "--workdir", str(tmp_path / "out")]) == 1


def test_fits_need_no_jax():
    code = (
        "import sys, sqzjax.analysis.scaling_bootstrap, sqzjax.analysis.scaling_parametric, "
        "sqzjax.analysis.scaling_envelope, eval.scaling_config, eval.scaling_points; "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
