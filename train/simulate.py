# SPDX-License-Identifier: Apache-2.0
"""Simulate weather to train on: `python -m train CONFIG` with `kind: simulate` in the config.

The working directory gets `weather.zarr`, in WeatherBench2's layout, which `data: {kind: fields,
path: ...}` reads, `config.yaml` and `simulate.log`. Until it is complete it lies in
`.weather.zarr.tmp` beside the last state, from which the same command continues: bit for bit what
an undisturbed run on the same machine gives.
"""

import json
import logging
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sqzjax import config as configs
from sqzjax.errors import ConfigError, DataError
from sqzjax.fields.archive import DEFAULT_NAME
from sqzjax.io import atomic
from sqzjax.io.lock import WorkdirLock
from train.data.pipeline import differences
from train.logs import log_file
from train.plan import readable
from train.preempt import EXIT_PREEMPTED, Preemption
from train.simulate_config import SimulateConfig
from train.simulation import UNITS, Simulation, build

_log = logging.getLogger(__name__)
PROGRESS = ".weather.progress.npz"
ATTRIBUTE = "simulation"
"""Attribute of an archive: the configuration that made it, as JSON."""
_FASTEST = 300.0  # m/s; real winds stay below 150
_ADVICE = "lower time_step_minutes, diffusion_hours or mountain_height"


def run(
    config: SimulateConfig, *, workdir: Path, resume: str = "auto", dry_run: bool = False
) -> int:
    """Simulate and return the exit code: 0 done, or there already; 75 stopped and saved.

    `resume`: "auto" goes on where the folder's simulation stopped, "never" starts anew. DataError
    if the folder holds a simulation with other settings, which stays as it is.
    """
    if resume.isdecimal():
        raise ConfigError(f"--resume {resume}: a simulation has no such steps; use auto or never")
    if dry_run:
        sys.stdout.write(f"{configs.dump(config)}\n{describe(config)}\n")
        return 0
    workdir = Path(workdir)
    with WorkdirLock(workdir), log_file(workdir / "simulate.log"), Preemption() as preemption:
        archive, unfinished = workdir / DEFAULT_NAME, workdir / f".{DEFAULT_NAME}.tmp"
        if resume == "never":
            (workdir / PROGRESS).unlink(missing_ok=True)
            for folder in (archive, unfinished):
                shutil.rmtree(folder, ignore_errors=True)
        if archive.exists():
            _check_same(archive, config)
            (workdir / PROGRESS).unlink(missing_ok=True)
            _log.info("%s is there already", archive)
            return 0
        if not _fill(config, unfinished, preemption):
            _log.warning("asked to stop: the states so far are saved, the same command continues")
            return EXIT_PREEMPTED
        unfinished.rename(archive)
        (workdir / PROGRESS).unlink(missing_ok=True)
    return 0


def describe(config: SimulateConfig) -> str:
    """Return what a simulation makes, as lines of text."""
    fields = len(config.variables) * len(config.levels) + 1
    size = 4 * config.num_states * fields * config.latitudes * config.longitudes
    lines = (
        ("states", f"{config.num_states:,} of {fields} fields"),
        ("time steps", f"{config.num_states * config.steps_per_state:,} after the spin-up"),
        ("archive", f"{readable(size)} before compression"),
    )
    return "\n".join(f"{name:12}{value}" for name, value in lines)


def _fill(config: SimulateConfig, folder: Path, preemption: Preemption) -> bool:
    """Compute what an unfinished archive lacks; return whether it is complete.

    States are counted from the end of the spin-up: while it lasts, `done` is negative.
    """
    import zarr

    progress = folder.parent / PROGRESS
    stored = _load_progress(progress) if folder.is_dir() and progress.exists() else None
    if stored is not None:
        _check_same(folder, config, stored["told"])
    simulation = build(config)
    (folder.parent / "config.yaml").write_text(configs.dump(config), encoding="utf-8")
    if stored is None:
        progress.unlink(missing_ok=True)
        create(folder, config, simulation)
        state, done = simulation.start(), -config.spin_up_states
        _log.info("spin-up of %d days", config.spin_up_days)
    else:
        state, done = _restore(stored, simulation)
    group: Any = zarr.open_group(folder, mode="r+", zarr_format=2)
    began, first = time.perf_counter(), done
    while done < config.num_states:
        if preemption.requested:
            return False
        count = min(config.chunk_states, -done if done < 0 else config.num_states - done)
        state, fields = advance(simulation, state, count, done)
        for name, values in fields.items() if done >= 0 else ():
            group[name][done : done + count] = values
        done += count
        _save_progress(progress, state, done, config)
        if (done // config.chunk_states) % 10 == 0 or done == config.num_states:
            each = (time.perf_counter() - began) / (done - first)
            _log.info("state %d of %d: %.3g s each", done, config.num_states, each)
    zarr.consolidate_metadata(folder, zarr_format=2)
    return True


def advance(
    simulation: Simulation, state: Any, count: int, first: int
) -> tuple[Any, dict[str, np.ndarray]]:
    """Go on by `count` states, of which the next is number `first`; return what they show.

    The last state, and fields on the host by name, `[count, levels, H, W]` or `[count, H, W]`.
    DataError as of `check_sane`.
    """
    shown = []
    for _ in range(count):
        state, fields = simulation.advance(state)
        shown.append(jax.device_get(fields))
    fields = {name: np.stack([one[name] for one in shown]) for name in shown[0]}
    check_sane(fields, first)
    return state, fields


def check_sane(fields: dict[str, np.ndarray], first: int) -> None:
    """Raise DataError if a field is not finite, or a wind faster than any on Earth.

    `first` is the number of the first state, for the message; it is negative in the spin-up.
    """
    for name, values in fields.items():
        if not np.isfinite(values).all():
            raise DataError(f"the simulation broke down near state {first}: {name}; {_ADVICE}")
        if "wind" in name and np.abs(values).max() > _FASTEST:
            raise DataError(
                f"near state {first} {name} reaches {np.abs(values).max():.0f} m/s; {_ADVICE}"
            )


def create(folder: Path, config: SimulateConfig, simulation: Simulation) -> None:
    """Create an archive of full size without states, in WeatherBench2's layout."""
    import xarray
    import zarr

    grid = config.grid
    hours = np.arange(config.num_states) * np.timedelta64(config.interval_hours, "h")
    places = ("latitude", "longitude")
    xarray.Dataset(
        {
            name: (places, field, {"units": UNITS[name]})
            for name, field in simulation.constants.items()
        },
        coords={
            "time": np.datetime64(config.start, "ns") + hours,
            "level": ("level", np.array(config.levels, np.int32), {"units": "hPa"}),
            "latitude": ("latitude", grid.latitude(), {"units": "degrees_north"}),
            "longitude": ("longitude", grid.longitude(), {"units": "degrees_east"}),
        },
        attrs={ATTRIBUTE: _told(config), "grid": grid.layout},
    ).to_zarr(folder, mode="w", zarr_format=2, consolidated=False)
    group = zarr.open_group(folder, mode="r+", zarr_format=2)
    for name in (*config.variables, "surface_pressure"):
        inner = places if name == "surface_pressure" else ("level", *places)
        sizes = [len(config.levels)] * (len(inner) - 2) + list(grid.shape)
        array = group.create_array(
            name,
            shape=(config.num_states, *sizes),
            chunks=(min(config.chunk_states, config.num_states), *sizes),
            dtype=np.float32,
            fill_value=np.nan,
        )
        array.attrs.update({"_ARRAY_DIMENSIONS": ["time", *inner], "units": UNITS[name]})


def _told(config: SimulateConfig) -> str:
    return json.dumps(configs.to_dict(config), sort_keys=True)


def _check_same(folder: Path, config: SimulateConfig, progress: Any = None) -> None:
    """Raise DataError if the folder, or the progress beside it, was made with other settings."""
    import zarr

    try:
        attributes = zarr.open_group(folder, mode="r", zarr_format=2).attrs
        stored = json.loads(str(attributes[ATTRIBUTE]))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{folder} is no archive of a simulation ({error!r}); choose another --workdir"
        ) from error
    now = json.loads(_told(config))
    different = differences(stored, now, "archive")
    if progress is not None:
        different += differences(json.loads(str(progress)), now, "progress")
    if different:
        raise DataError(
            f"{folder} was simulated otherwise; restore the old setting, choose another "
            "--workdir, or pass --resume never to discard it:\n  " + "\n  ".join(different)
        )


def _save_progress(path: Path, state: Any, done: int, config: SimulateConfig) -> None:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    named: dict[str, Any] = {f"leaf{number}": leaf for number, leaf in enumerate(leaves)}
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, done=done, told=_told(config), **named)


def _load_progress(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {"told": stored["told"], "done": stored["done"], **stored}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} holds no state of a simulation ({error!r}); pass --resume never to start anew"
        ) from error


def _restore(stored: dict[str, np.ndarray], simulation: Simulation) -> tuple[Any, int]:
    """Return the state that was saved, and how many states are done."""
    tree = jax.tree.structure(jax.eval_shape(simulation.start))
    leaves = [stored[f"leaf{number}"] for number in range(tree.num_leaves)]
    return jax.tree.unflatten(tree, leaves), int(stored["done"])
