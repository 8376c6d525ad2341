# SPDX-License-Identifier: Apache-2.0
"""Records of single fits: laws of the optima, the envelope, the parametric law, the held-out test.

Numbers in, plain dicts out; an interval is None where nothing could be resampled.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from eval.scaling_config import ScalingConfig, Target
from eval.scaling_points import Runs
from sqzjax.analysis.scaling_bootstrap import OptimaSamples, interval, law_samples
from sqzjax.analysis.scaling_envelope import Curve, envelope
from sqzjax.analysis.scaling_laws import (
    IsoFlop,
    PowerLaw,
    fit_power_law,
    fit_saturating_law,
    saturating_laws,
)
from sqzjax.analysis.scaling_parametric import (
    ParametricLaw,
    fit_parametric,
    optima_of,
    refit_resampled,
)

Record = dict[str, Any]


class Uncertain(NamedTuple):
    """What intervals are made from, and the computes that laws are extended to."""

    samples: OptimaSamples | None
    confidence: float
    targets: tuple[Target, ...]


def law_record(
    name: str,
    optima: Sequence[tuple[float, float, float]],
    data: Sequence[float | None],
    uncertain: Uncertain,
) -> Record:
    """Fit size, loss and data against compute, the loss with and without a floor, and extend."""
    budgets, sizes, losses = (np.array(values) for values in zip(*optima))
    size_law, loss_law = fit_power_law(budgets, sizes), fit_power_law(budgets, losses)
    samples = uncertain.samples
    drawn = {} if samples is None else law_samples(samples)
    record: Record = {"name": name, "budgets": budgets.tolist()}
    record["size"] = _power(size_law, drawn.get("size"), uncertain)
    record["loss"] = _power(loss_law, drawn.get("loss"), uncertain)
    record["data"] = None
    if all(value is not None for value in data):
        law = fit_power_law(budgets, np.array(data, float))
        record["data"] = _power(law, drawn.get("data"), uncertain)
    record["saturating"], bending = _saturating(budgets, losses, uncertain)
    record["loss_error"] = _error(losses, loss_law(budgets))
    grid = np.geomspace(budgets.min(), max([budgets.max(), *_computes(uncertain)]), 40)
    record["curves"] = _bands(grid, drawn, bending, record, uncertain)
    record["targets"] = [
        _target(one, record, drawn, bending, uncertain) for one in uncertain.targets
    ]
    return record


def _computes(uncertain: Uncertain) -> list[float]:
    return [target.flops for target in uncertain.targets]


def _error(measured: np.ndarray, predicted: Any) -> float:
    """Return the root mean square of the log residuals: the relative error of a law."""
    return float(np.sqrt(np.mean(np.log(measured / predicted) ** 2)))


def _power(law: PowerLaw, drawn: np.ndarray | None, uncertain: Uncertain) -> Record:
    record: Record = {"coefficient": law.coefficient, "exponent": law.exponent}
    ends = (None, None) if drawn is None else interval(drawn, uncertain.confidence).T.tolist()
    return record | {"coefficient_interval": ends[0], "exponent_interval": ends[1]}


def _saturating(
    budgets: np.ndarray, losses: np.ndarray, uncertain: Uncertain
) -> tuple[Record | None, np.ndarray | None]:
    """Return the law with a floor (None below three budgets) and its resamples."""
    if len(losses) < 3:
        return None, None
    law = fit_saturating_law(budgets, losses)
    record: Record = law._asdict()
    record["error"] = _error(losses, law(budgets))
    drawn = None
    if uncertain.samples is not None:
        drawn = saturating_laws(budgets, uncertain.samples.loss, law.reference)
    ends = [None] * 3 if drawn is None else interval(drawn, uncertain.confidence).T.tolist()
    for name, one in zip(("floor", "coefficient", "exponent"), ends):
        record[f"{name}_interval"] = one
    return record, drawn


def _predictions(
    compute: np.ndarray, record: Record, drawn: dict[str, np.ndarray], bending: np.ndarray | None
) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Return what each law says at some computes, and what its resamples say."""
    found: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for name in ("size", "loss"):
        law = PowerLaw(record[name]["coefficient"], record[name]["exponent"])
        rows = None
        if name in drawn:
            rows = drawn[name][:, :1] * compute ** drawn[name][:, 1:]
        found[name] = np.asarray(law(compute)), rows
    if record["saturating"]:
        law = record["saturating"]
        ratio = compute / law["reference"]
        rows = (
            None
            if bending is None
            else (bending[:, :1] + bending[:, 1:2] * ratio ** -bending[:, 2:])
        )
        curve = law["floor"] + law["coefficient"] * ratio ** -law["exponent"]
        found["saturating"] = curve, rows
    return found


def _bands(
    grid: np.ndarray,
    drawn: dict[str, np.ndarray],
    bending: np.ndarray | None,
    record: Record,
    uncertain: Uncertain,
) -> Record:
    """Return curves with their intervals for drawing."""
    curves: Record = {"compute": grid.tolist()}
    for name, (curve, rows) in _predictions(grid, record, drawn, bending).items():
        ends = None if rows is None else interval(rows, uncertain.confidence).tolist()
        curves[name] = {"values": curve.tolist(), "interval": ends}
    return curves


def _target(
    target: Target,
    record: Record,
    drawn: dict[str, np.ndarray],
    bending: np.ndarray | None,
    uncertain: Uncertain,
) -> Record:
    row: Record = {
        "flops": target.flops,
        "measured_loss": target.loss,
        "measured_size": target.size,
    }
    found = _predictions(np.array([target.flops]), record, drawn, bending)
    for name, (value, rows) in found.items():
        row[name] = float(value[0])
        row[f"{name}_interval"] = (
            None if rows is None else interval(rows[:, 0], uncertain.confidence).tolist()
        )
    return row


def envelope_record(runs: Runs, size: np.ndarray) -> Record:
    """Fit the envelope of each size's losses over compute; `error` says why there is none."""
    curves = []
    for label in dict.fromkeys(runs.labels):
        own = np.array(runs.labels) == label
        data = None if runs.data is None else runs.data[own]
        curves.append(Curve(float(size[own][0]), runs.flops[own], runs.loss[own], data))
    try:
        found = envelope(curves)
    except ValueError as error:
        return {"error": str(error)}
    laws = {"size": found.size_law, "loss": found.loss_law, "data": found.data_law}
    return {
        "error": "",
        "winners": list(found.winners),
        "compute": [float(found.compute[0]), float(found.compute[-1])],
    } | {name: None if law is None else law._asdict() for name, law in laws.items()}


def parametric_record(config: ScalingConfig, runs: Runs, size: np.ndarray) -> Record:
    """Fit `E + A/N^alpha + B/D^beta` with intervals; `error` says why it was not possible."""
    data, per_pair = runs.amount, runs.flops_per_pair(config.size)
    if data is None:
        return {"error": "the points do not say how much data each run saw"}
    try:
        fit = fit_parametric(size, data, runs.loss)
        fit.law.optimum(runs.flops.max(), per_pair)
    except ValueError as error:
        return {"error": str(error)}
    options = config.bootstrap
    drawn = refit_resampled(
        fit, size, data, runs.loss, resamples=options.resamples, seed=options.seed
    )
    good = drawn[~np.isnan(drawn).any(1)]
    law, confidence = fit.law, options.confidence
    shares = good[:, 4] / (good[:, 3] + good[:, 4])
    return {
        "error": "",
        **law._asdict(),
        "intervals": dict(zip(law._fields, interval(good, confidence).T.tolist())),
        "size_exponent": law.size_exponent,
        "size_exponent_interval": interval(shares, confidence).tolist(),
        "objective": fit.objective,
        "gradient": fit.gradient,
        "converged": fit.converged,
        "starts": fit.starts,
        "agreeing": fit.agreeing,
        "resamples_failed": float(1 - len(good) / len(drawn)),
        "flops_per_pair": per_pair,
        "unit": runs.amount_unit,
        "data": data.tolist(),
        "residuals": np.log(runs.loss / law(size, data)).tolist(),
        "targets": [
            _parametric_target(law, good, one, per_pair, confidence) for one in config.targets
        ],
    }


def _parametric_target(
    law: ParametricLaw, drawn: np.ndarray, target: Target, per_pair: float, confidence: float
) -> Record:
    best, data = law.optimum(target.flops, per_pair)
    names = ("size", "data", "loss")
    ends = [interval(one, confidence).tolist() for one in optima_of(drawn, target.flops, per_pair)]
    values = dict(zip(names, (float(best), float(data), float(law(best, data)))))
    return {"flops": target.flops} | values | {f"{n}_interval": e for n, e in zip(names, ends)}


def held_out_record(config: ScalingConfig, runs: Runs, iso: IsoFlop) -> list[Record]:
    """Fit without the largest budgets and tell how well each law predicts them."""
    kept, asked = list(iso.optima), min(config.held_out, max(len(iso.optima) - 2, 0))
    if not asked:
        return []
    seen, hidden = kept[:-asked], kept[-asked:]
    budgets, sizes, losses = (
        np.array([getattr(one, name) for one in seen]) for name in ("budget", "size", "loss")
    )
    size_law, loss_law = fit_power_law(budgets, sizes), fit_power_law(budgets, losses)
    bent = fit_saturating_law(budgets, losses) if len(seen) >= 3 else None
    law = _parametric_below(config, runs, hidden[0].budget)
    rows = []
    for one in hidden:
        row: Record = {"budget": one.budget, "size": one.size, "loss": one.loss}
        row["predicted_size"] = float(size_law(one.budget))
        row["power_law"] = float(loss_law(one.budget))
        row["saturating"] = None if bent is None else float(bent(one.budget))
        row["parametric"] = None
        if law is not None:
            row["parametric"] = float(law[0](*law[0].optimum(one.budget, law[1])))
        rows.append(row)
    return rows


def _parametric_below(
    config: ScalingConfig, runs: Runs, hidden: float
) -> tuple[ParametricLaw, float] | None:
    """Return the parametric law of all smaller budgets and its FLOPs per parameter and datum.

    None where they do not settle one.
    """
    own = runs.budget < hidden  # a refused budget beyond it would tell of it too
    if not config.parametric or runs.amount is None:
        return None
    per_pair = runs.flops_per_pair(config.size, own)
    try:
        law = fit_parametric(runs.sizes[config.size][own], runs.amount[own], runs.loss[own]).law
        law.optimum(hidden, per_pair)
    except ValueError:
        return None
    return law, per_pair
