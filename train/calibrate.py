# SPDX-License-Identifier: Apache-2.0
"""Calibrate a cache: `python -m train CONFIG` with `kind: calibrate` in the config.

The working directory gets `kvquant.safetensors`, which `cache: {kind: kvquant, calibration: ...}`
reads, `config.yaml`, `calibrate.log` and, until it is done, `progress.safetensors`: the same
command continues an interrupted calibration.
"""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sqzjax import calibration, sharding
from sqzjax import config as configs
from sqzjax.artefact import Artefact
from sqzjax.cli import EXIT_NONFINITE
from sqzjax.errors import ConfigError
from sqzjax.io.lock import WorkdirLock
from sqzjax.models import DecoderLM
from sqzjax.typing import Params
from train import data
from train.calibrate_config import CalibrateConfig
from train.families import Language
from train.logs import log_file
from train.plan import readable
from train.preempt import EXIT_PREEMPTED, Preemption
from train.run import as_config_error, out_of_memory
from train.step import INIT_KEY, role_key

_log = logging.getLogger(__name__)
ARTEFACT, PROGRESS = "kvquant.safetensors", "progress.safetensors"


@dataclass(frozen=True)
class CalibratePlan:
    """What a calibration needs, from shapes alone."""

    num_params: int
    parameter_bytes: int
    sample_bytes: int
    count_bytes: int

    def describe(self) -> str:
        """Return the plan as lines of text."""
        lines = (
            ("parameters", f"{self.num_params:,}"),
            ("parameter bytes", f"{readable(self.parameter_bytes)} on one device"),
            ("sample bytes", f"{readable(self.sample_bytes)} of keys, values and gradients"),
            ("host bytes", f"{readable(self.count_bytes)} of histograms"),
        )
        return "\n".join(f"{name:18}{value}" for name, value in lines)

    def out_of_memory(self) -> str:
        """Return the message of a run that does not fit, with the settings to change."""
        return (
            f"out of memory; one device needs {readable(self.parameter_bytes)} of parameters and "
            f"{readable(self.sample_bytes)} of keys, values and gradients; lower length, set "
            "execution.remat: full, or raise mesh.fsdp or mesh.tensor"
        )


def run(
    config: CalibrateConfig, *, workdir: Path, resume: str = "auto", dry_run: bool = False
) -> int:
    """Calibrate and return the exit code: 0 done, 3 non-finite, 75 preempted and saved.

    `resume`: "auto" goes on where the folder's calibration stopped, "never" discards it; a step has
    no meaning here. `dry_run` prints the resolved configuration and what the run needs.
    """
    if resume.isdecimal():
        raise ConfigError(f"--resume {resume}: a calibration has no steps; use auto or never")
    with as_config_error():
        model = DecoderLM(config.resolve_model(), config.execution)
        mesh = sharding.make_mesh(config.mesh)
        plan = make_plan(config, model, mesh)
    if dry_run:
        sys.stdout.write(f"{configs.dump(config)}\n{plan.describe()}\n")
        return 0
    workdir = Path(workdir)
    with WorkdirLock(workdir), log_file(workdir / "calibrate.log"), Preemption() as preemption:
        with jax.set_mesh(mesh), out_of_memory(plan):
            return _calibrate(config, workdir, resume, preemption)


def make_plan(config: CalibrateConfig, model: DecoderLM, mesh: Any) -> CalibratePlan:
    """Count what a calibration needs; ValueError when the model does not fit the mesh."""
    params = model.abstract_params()
    placed = sharding.shardings(params, mesh, config.rules)
    sharding.check_unused(config.rules, params)
    sizes = jax.tree.map(
        lambda leaf, place: np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        params,
        placed,
    )
    shape, method = model.config, config.method
    channels = shape.num_layers * shape.num_kv_heads * shape.head_dim
    histograms = 48 * len(method.outliers) * shape.num_layers * method.bins
    return CalibratePlan(
        num_params=shape.num_params,
        parameter_bytes=int(sum(jax.tree.leaves(sizes))),
        sample_bytes=16 * config.length * channels,
        count_bytes=4 * channels * method.range_bins + histograms,
    )


class Prepared(NamedTuple):
    """What a calibration works on."""

    model: DecoderLM
    params: Params
    dataset: data.Dataset


def prepare(config: CalibrateConfig, workdir: Path) -> Prepared:
    """Read data and parameters; the mesh is that of the configuration."""
    model = DecoderLM(config.resolve_model(), config.execution)
    dataset = data.build(
        config.data,
        seed=config.seed,
        batch_size=1,
        seq_len=config.length,
        cache_dir=workdir / "data",
    )
    Language().complete(model.config, dataset)  # checks the vocabulary
    mesh = sharding.make_mesh(config.mesh)
    placed = sharding.shardings(model.abstract_params(), mesh, config.rules)
    params = Language().load(config.model, model, placed, role_key(config.seed, INIT_KEY))
    return Prepared(model, params, dataset)


def _calibrate(config: CalibrateConfig, workdir: Path, resume: str, preemption: Preemption) -> int:
    with as_config_error():
        model, params, dataset = prepare(config, workdir)
        calibrator = calibration.Calibrator(model, params, config.method)
        progress = Progress(workdir / PROGRESS, calibrator, config, dataset)
        progress.start(resume)
    # Not before: what a command that is refused finds in the folder stays as it was.
    (workdir / "config.yaml").write_text(configs.dump(config), encoding="utf-8")
    began = time.perf_counter()

    def after() -> bool:
        return progress.after(preemption)

    try:
        done = calibration.run(calibrator, dataset.batch, config.samples, after)
    except calibration.NonFiniteError as error:
        _log.error("%s", error)
        return EXIT_NONFINITE
    if not done:
        _log.warning("asked to stop: progress is saved, the same command continues")
        return EXIT_PREEMPTED
    calibration.save(workdir / ARTEFACT, calibrator.finish())
    progress.path.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    _log.info("calibrated in %.3g s; wrote %s", seconds, workdir / ARTEFACT)
    return 0


class Progress:
    """The saved state of a calibration under way."""

    def __init__(
        self,
        path: Path,
        calibrator: calibration.Calibrator,
        config: CalibrateConfig,
        dataset: data.Dataset,
    ):
        self.path, self.calibrator, self.config = path, calibrator, config
        self.data = "; ".join(f"{name}: {value}" for name, value in dataset.fingerprint.items())
        self.data += f"; samples: {config.samples}"

    def start(self, resume: str) -> None:
        """Restore what was saved, if it belongs to this run; discard it if told to."""
        if resume == "never" or not self.path.exists():
            self.path.unlink(missing_ok=True)
            return
        state = calibration.load(self.path)
        if state.metadata.get("data") != self.data:
            raise ConfigError(
                f"{self.path} was made from other data ({state.metadata.get('data')}; now "
                f"{self.data}); restore the old settings or start anew with --resume never"
            )
        self.calibrator.restore(state)
        _log.info("resuming %s", self._where())

    def after(self, preemption: Preemption) -> bool:
        """Save now and then, and when asked to stop; return whether to go on."""
        _log.info("%s", self._where())
        stop = preemption.requested
        if stop or self.calibrator.done % self.config.save_every == 0:
            state = self.calibrator.state()
            saved = Artefact(state.arrays, {**state.metadata, "data": self.data})
            calibration.save(self.path, saved)
        return not stop

    def _where(self) -> str:
        passes = calibration.PASSES
        name = passes[min(self.calibrator.number, len(passes) - 1)]
        return f"pass {name}: {self.calibrator.done} of {self.config.samples} samples"
