# SPDX-License-Identifier: Apache-2.0
"""`python -m eval CONFIG [key=value ...]`: evaluate models, measure their speed, plan capacity."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqzjax.cli import EXIT_FAILED, EXIT_OK, Command, Program, start

PROGRAM = Program(
    name="eval",
    summary="Evaluate models side by side and write a report; `kind: speed` times them, "
    "`kind: plan` compiles them for TPUs that need not be there, `kind: arm_vs_dlm` compares "
    "autoregressive and diffusion decoding on paper, `kind: kv_leaderboard` compares caches on a "
    "model, `kind: cache_bytes` says what they take at any length, "
    "`kind: scaling` fits scaling laws to a sweep, `kind: forecast` scores weather emulators.",
    commands={
        "": Command(schema="eval.config:EvalConfig", run="eval.run:run"),
        "speed": Command(schema="eval.speed_config:SpeedConfig", run="eval.__main__:run_speed"),
        "plan": Command(schema="eval.plan_config:PlanConfig", run="eval.__main__:run_plan"),
        "arm_vs_dlm": Command(
            schema="eval.arm_vs_dlm_config:ArmVsDlmConfig", run="eval.__main__:run_arm_vs_dlm"
        ),
        "kv_leaderboard": Command(
            schema="eval.kv_leaderboard_config:KvLeaderboardConfig",
            run="eval.__main__:run_kv_leaderboard",
        ),
        "cache_bytes": Command(
            schema="eval.cache_plan_config:CachePlanConfig", run="eval.__main__:run_cache_bytes"
        ),
        "forecast": Command(
            schema="eval.forecast_config:ForecastConfig", run="eval.__main__:run_forecast"
        ),
        "scaling": Command(
            schema="eval.scaling_config:ScalingConfig", run="eval.__main__:run_scaling"
        ),
    },
    example="python -m eval configs/eval/demo.yaml --workdir runs/demo/eval",
)


def run_speed(config: Any, *, workdir: Path, dry_run: bool) -> int:
    """Time models, write `speed.json` and `speed.md`, and print the tables."""
    if dry_run:
        return _show(config)
    from eval import speed

    print(speed.markdown(speed.run_speed(config, workdir)))
    return EXIT_OK


def run_plan(config: Any, *, workdir: Path, dry_run: bool) -> int:
    """Compile for a TPU topology, write `plan.json` and `plan.md`, and print the tables."""
    if dry_run:
        return _show(config)
    from eval import plan, plan_report

    record = plan.run_plan(config, workdir)
    print(plan_report.markdown(record))
    failed = any(row["status"] == "failed" for row in record["programs"])
    return EXIT_FAILED if failed else EXIT_OK


def run_arm_vs_dlm(config: Any, *, workdir: Path, dry_run: bool) -> int:
    """Compare autoregressive and diffusion decoding on paper, and print the findings."""
    if dry_run:
        return _show(config)
    from eval import arm_vs_dlm, arm_vs_dlm_report

    record = arm_vs_dlm.run_arm_vs_dlm(config, workdir)
    print("\n".join(f"- {line}" for line in arm_vs_dlm_report.findings(record)))
    return EXIT_OK


def run_kv_leaderboard(config: Any, *, workdir: Path, dry_run: bool) -> int:
    """Try every cache on a model, write the table, the plots and the page, and print the table."""
    from eval import kv_leaderboard, kv_leaderboard_report

    if dry_run:
        return _show(config, kv_leaderboard.problems(config))
    record = kv_leaderboard.run_kv_leaderboard(config, workdir)
    print(kv_leaderboard_report.markdown(record))
    failed = any(row["status"] != "ok" for row in record["rows"])
    return EXIT_FAILED if failed else EXIT_OK


def run_cache_bytes(config: Any, *, workdir: Path, dry_run: bool) -> int:
    """Say how many bytes caches take, write `cache_bytes.json` and `.md`, and print the tables."""
    if dry_run:
        return _show(config)
    from eval import cache_plan

    print(cache_plan.markdown(cache_plan.run_cache_plan(config, workdir)))
    return EXIT_OK


def run_scaling(config: Any, *, workdir: Path, dry_run: bool) -> int:
    """Fit scaling laws to a sweep, write the record, tables, drawings and page, and print them."""
    if dry_run:
        return _show(config)
    from eval import scaling, scaling_report

    print(scaling_report.markdown(scaling.run_scaling(config, workdir)), end="")
    return EXIT_OK


def run_forecast(config: Any, *, workdir: Path, dry_run: bool) -> int:
    """Score weather emulators, write the record, the maps and the page, and print the table."""
    from eval import forecast, forecast_report

    if dry_run:
        return _show(config, [f"not found yet: {line}" for line in forecast.problems(config)])
    print(forecast_report.markdown(forecast.run_forecast(config, workdir)))
    return EXIT_OK


def _show(config: Any, problems: Sequence[str] = ()) -> int:
    """Print a configuration, and what would go wrong with it as comments below."""
    from sqzjax.config import dump

    print(dump(config) + "".join(f"# {line}\n" for line in problems), end="")
    return EXIT_OK


if __name__ == "__main__":
    start(PROGRAM)
