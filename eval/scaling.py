# SPDX-License-Identifier: Apache-2.0
"""Scaling laws of a sweep: every fit of one set of runs, with intervals, in `scaling.json`.

The fits live in `sqzjax.analysis.scaling_*`; this module runs them side by side on the same runs
and records what each says, what was refused, and how far it can be trusted. Takes seconds.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from eval import scaling_points
from eval.provenance import provenance
from eval.scaling_config import ScalingConfig
from eval.scaling_fits import (
    Uncertain,
    envelope_record,
    held_out_record,
    law_record,
    parametric_record,
)
from eval.scaling_points import Runs
from eval.tables import rounded
from sqzjax import config as configs
from sqzjax.analysis.scaling_bootstrap import (
    OptimaSamples,
    akima_optima,
    interval,
    resampled_optima,
    residual_deviation,
    with_known_optima,
)
from sqzjax.analysis.scaling_laws import IsoFlop, isoflop
from sqzjax.errors import DataError
from sqzjax.io import atomic
from sqzjax.io.lock import check_writable

_LOG = logging.getLogger(__name__)
LEAST_DECADES = 2.0


def run_scaling(config: ScalingConfig, workdir: Path) -> dict[str, Any]:
    """Fit, write `scaling.json`, `table.md`, drawings and `report.html`, and return the record."""
    from eval import scaling_report

    runs = scaling_points.read(config)
    check_writable(workdir)  # before the fits, which take long
    record = fit(config, runs)
    save(record, workdir / "scaling.json")
    scaling_report.write(record, workdir)
    return record


def save(record: dict[str, Any], path: Path) -> None:
    """Replace a record at once, so that a reader never sees half of it."""
    atomic.write_text(path, json.dumps(rounded(record), indent=1, allow_nan=False) + "\n")


def fit(config: ScalingConfig, runs: Runs) -> dict[str, Any]:
    """Return every fit of some runs as a record of plain numbers."""
    size = runs.sizes[config.size]
    try:
        iso = isoflop(runs.budget, size, runs.loss, runs.data, log_loss=config.log_loss)
    except ValueError as error:
        raise DataError(str(error)) from None
    samples = _resampled(config, runs, iso, size)
    uncertain = Uncertain(samples, config.bootstrap.confidence, config.targets)
    _LOG.info("%d runs, %d budgets accepted", len(runs.loss), len(iso.optima))
    record = provenance("scaling", packages=("scipy",)) | {
        "title": config.title,
        "config": configs.to_dict(config),
        "runs": _runs(runs, config),
        "isoflop": _isoflop(iso, samples, config.bootstrap.confidence),
        "laws": _laws(config, runs, iso, uncertain),
        "sizes": _other_sizes(config, runs),
        "envelope": envelope_record(runs, size),
        "parametric": parametric_record(config, runs, size) if config.parametric else None,
        "held_out": held_out_record(config, runs, iso),
        "six_nd": _six_nd(runs),
        "schedules": list(runs.schedules),
    }
    return record | {"warnings": _warnings(record)}


def _resampled(
    config: ScalingConfig, runs: Runs, iso: IsoFlop, size: np.ndarray
) -> OptimaSamples | None:
    """Return resampled optima; None where three runs a budget leave no residuals to draw."""
    options = config.bootstrap
    try:
        return resampled_optima(
            iso,
            runs.budget,
            size,
            runs.loss,
            runs.data,
            scheme=options.scheme,
            resamples=options.resamples,
            seed=options.seed,
            log_loss=config.log_loss,
        )
    except ValueError as error:
        _LOG.warning("no intervals: %s", error)
        return None


def _runs(runs: Runs, config: ScalingConfig) -> dict[str, Any]:
    """Summarise what was fitted, with the runs themselves."""
    size = runs.sizes[config.size]
    columns = zip(runs.names, runs.labels, runs.budget, runs.flops, size, runs.loss)
    names = ("name", "size", "budget", "flops", "N", "loss")
    points: list[dict[str, Any]] = [
        dict(zip(names, (*row[:2], *map(float, row[2:])))) for row in columns
    ]
    for name, values in (("data", runs.data), ("epochs", runs.epochs)):
        for point, value in zip(points, values if values is not None else ()):
            point[name] = float(value)
    return {
        "source": runs.source,
        "schedule": runs.schedule,
        "loss_kind": runs.loss_kind,
        "unit": runs.unit,
        "count": len(points),
        "left_out": runs.left_out,
        "decades": float(np.log10(runs.budget.max() / runs.budget.min())),
        "points": points,
        "known": [list(one) for one in runs.known],
        "moved": [list(one) for one in runs.moved],
    }


def _isoflop(iso: IsoFlop, samples: OptimaSamples | None, confidence: float) -> dict[str, Any]:
    optima = []
    for index, one in enumerate(iso.optima):
        row = {
            "budget": one.budget,
            "size": one.size,
            "loss": one.loss,
            "data": one.data,
            "coefficients": list(one.coefficients),
            "points": one.points,
        }
        for name in ("size", "loss"):
            column = None if samples is None else getattr(samples, name)[:, index]
            row[f"{name}_interval"] = (
                None if column is None else interval(column, confidence).tolist()
            )
        row["resamples_refused"] = None if samples is None else float(samples.refused()[index])
        optima.append(row)
    refusals = [{"budget": one.budget, "reason": one.reason} for one in iso.refusals]
    return {"optima": optima, "refusals": refusals}


def _laws(
    config: ScalingConfig, runs: Runs, iso: IsoFlop, uncertain: Uncertain
) -> list[dict[str, Any]]:
    """Return laws of the parabolas' optima, with known ones added, and of Akima interpolation."""
    options = config.bootstrap
    optima = [(one.budget, one.size, one.loss) for one in iso.optima]
    data = [one.data for one in iso.optima]
    laws = [law_record("parabolas", optima, data, uncertain)]
    if runs.known:
        samples = uncertain.samples
        if samples is not None:
            deviation = options.known_deviation
            samples = with_known_optima(samples, runs.known, deviation=deviation, seed=options.seed)
        joined = [*runs.known, *optima]
        name = f"with {len(runs.known)} known optima"
        laws.append(
            law_record(name, joined, [None] * len(joined), uncertain._replace(samples=samples))
        )
    akima = _akima(config, runs, iso)
    if akima is not None:
        middle = [
            (one.budget, float(np.nanmedian(size)), float(np.nanmedian(loss)))
            for one, size, loss in zip(iso.optima, akima.size.T, akima.loss.T)
        ]
        laws.append(
            law_record(
                "Akima, noise redrawn",
                middle,
                [None] * len(middle),
                uncertain._replace(samples=akima),
            )
        )
    return laws


def _akima(config: ScalingConfig, runs: Runs, iso: IsoFlop) -> OptimaSamples | None:
    """Return optima by interpolation; None where noise is unknown or a budget has none left."""
    options, size = config.bootstrap, runs.sizes[config.size]
    points = (runs.budget, size, runs.loss)
    noise = options.noise
    try:
        if noise is None:
            noise = residual_deviation(iso, *points, log_loss=config.log_loss)
    except ValueError as error:
        _LOG.warning("no Akima fit: %s", error)
        return None
    samples = akima_optima(
        iso, *points, runs.data, noise=noise, resamples=options.akima_resamples, seed=options.seed
    )
    if (samples.refused() == 1).any():
        _LOG.warning("no Akima fit: with a noise of %.3g a budget never has a minimum", noise)
        return None
    return samples


def _other_sizes(config: ScalingConfig, runs: Runs) -> list[dict[str, Any]]:
    """Return the law of the best size for each way to count parameters."""
    rows = []
    for name, size in runs.sizes.items():
        try:
            iso = isoflop(runs.budget, size, runs.loss, log_loss=config.log_loss)
        except ValueError as error:
            rows.append({"size": name, "error": str(error), "law": None})
            continue
        optima = [(one.budget, one.size, one.loss) for one in iso.optima]
        law = law_record(name, optima, [None] * len(optima), Uncertain(None, 0.95, config.targets))
        rows.append({"size": name, "error": "", "law": law})
    return rows


def _six_nd(runs: Runs) -> list[dict[str, Any]]:
    """Compare counted FLOPs with 6ND by size, for each way to count parameters.

    Where the tokens of a sample are unknown the ratio is that number, times how far off 6ND is.
    """
    data = runs.amount
    if data is None:
        return []
    rows = []
    for label in dict.fromkeys(runs.labels):
        own = np.array(runs.labels) == label
        ratios = {
            name: float(np.mean(runs.flops[own] / (6 * size[own] * data[own])))
            for name, size in runs.sizes.items()
        }
        sizes = {name: float(size[own][0]) for name, size in runs.sizes.items()}
        rows.append({"size": label, "sizes": sizes, "ratios": ratios})
    return sorted(rows, key=lambda row: row["sizes"]["params"])


def _warnings(record: dict[str, Any]) -> list[str]:
    """Say what a reader should not overlook."""
    found = []
    decades = record["runs"]["decades"]
    if decades < LEAST_DECADES - 1e-9:
        found.append(
            f"The budgets span {decades:.2f} decades; exponents fitted over fewer than "
            f"{LEAST_DECADES:g} say little about larger computes."
        )
    for nominal, spent in record["runs"]["moved"]:
        found.append(
            f"The runs of the budget of {nominal:.4g} FLOPs took {spent:.4g}, as counted; they are "
            "fitted at that."
        )
    for one in record["isoflop"]["refusals"]:
        found.append(f"The budget of {one['budget']:.4g} FLOPs is refused: {one['reason']}.")
    for one in record["isoflop"]["optima"]:
        if (one["resamples_refused"] or 0) > 0.1:
            found.append(
                f"At {one['budget']:.4g} FLOPs {one['resamples_refused']:.0%} of the resamples "
                "have no minimum between the sizes; its interval is that of the others."
            )
    wanted, tested = record["config"]["held_out"], len(record["held_out"])
    if tested < wanted:
        found.append(
            f"Only {tested} of held_out={wanted} budgets are held out: the laws need two others."
        )
    parametric = record["parametric"]
    if parametric and not parametric.get("error") and not parametric["converged"]:
        found.append(
            f"The parametric fit did not converge (gradient {parametric['gradient']:.2g} of its "
            "largest possible value)."
        )
    repeated = max((point.get("epochs") or 0 for point in record["runs"]["points"]), default=0)
    if repeated > 4:
        found.append(
            f"Some runs see their data {repeated:.1f} times; D counts repetitions as new data."
        )
    return found
