# SPDX-License-Identifier: Apache-2.0
"""Runs of emulators on the one trainer: resume, branches, export, plans, what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from sqzjax.analysis import swin_flops
from sqzjax.errors import ConfigError
from sqzjax.fields import Period
from sqzjax.io import checkpoint, swin
from sqzjax.models import Execution, SwinConfig
from sqzjax.sharding import MeshConfig, paths
from sqzjax.sphere import Grid
from tests.sqzjax import weather
from tests.train import toy
from train.config import CheckpointConfig, EvalConfig, LoRAConfig, TrainConfig
from train.continual import Branch, Continual
from train.data import FieldData
from train.families import family_of
from train.model_source import Custom, Swin
from train.objectives import LanguageModeling
from train.objectives.forecast import Forecast
from train.run import dry_plan, run
from train.session import Session

STEPS, HALF = 6, 3
MODEL = SwinConfig(
    grid=Grid(latitudes=8, longitudes=16, layout="cells"),
    in_channels=4,
    out_channels=2,
    embed_dim=8,
    depth=2,
    patch_size=2,
    window=(2, 4),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Six steps on forty states."""
    store = weather.write(weather.make(), tmp_path_factory.mktemp("store") / "a.zarr")
    data = FieldData(
        path=str(store),
        channels=("temperature_850", "surface_pressure"),
        constants=("land_sea_mask", "cos_latitude"),
        valid=(Period(start=0.8),),
        test=(),
        eval_samples=3,
    )
    return TrainConfig(
        model=Swin(config=MODEL),
        data=data,
        objective=Forecast(),
        execution=Execution(scan_layers=False),
        mesh=MeshConfig(data=1),
        batch_size=4,
        steps=STEPS,
        schedule=Continual(learning_rate=1e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(interval=HALF, async_save=False),
        eval=EvalConfig(interval=HALF, batches=1),
        export=True,
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert run(config, workdir=workdir) == 0
    return workdir


def params_of(workdir, step=STEPS):
    return checkpoint.restore_params(workdir / "checkpoints" / str(step)).items["params"]


@pytest.mark.slow
def test_an_interrupted_run_ends_at_the_same_bytes_and_is_exported(config, trained, tmp_path):
    before = params_of(trained)
    (trained / "checkpoints" / str(STEPS)).rename(tmp_path / "lost")
    assert run(config, workdir=trained) == 0
    assert toy.same_bytes(before, params_of(trained))
    exported, params = swin.load(trained / "export", execution=config.execution)
    assert exported == replace(MODEL, num_heads=MODEL.heads)
    assert toy.same_bytes(before, params)
    meta = checkpoint.read_meta(trained / "checkpoints" / str(STEPS))
    assert meta["samples_seen"] == STEPS * 4


@pytest.mark.slow
def test_a_branch_may_forecast_further(config, trained, tmp_path):
    """The window of the data is all that differs from the run that is branched from."""
    branch = replace(
        config, branch=Branch(run=str(trained), step=HALF), objective=Forecast(rollout=2)
    )
    assert run(branch, workdir=tmp_path) == 0
    assert not toy.same_bytes(params_of(tmp_path), params_of(trained))


def test_what_is_counted(config, tmp_path):
    plan = dry_plan(config)
    assert (plan.num_params, plan.unit, plan.units) == (MODEL.num_params, "samples", 4 * STEPS)
    session = Session(config, tmp_path)
    family = family_of(config)
    assert family.columns(config) == session.dataset.columns
    assert family.step_flops(config, MODEL) == swin_flops.training_flops(MODEL, 4)
    further = replace(config, objective=Forecast(rollout=3))
    assert further.row_length == 4
    assert family.step_flops(further, MODEL) == 3 * swin_flops.training_flops(MODEL, 4)
    batch = session.put(session.dataset.batch(0))
    assert np.array_equal(batch["fields"], session.dataset.batch(0)["fields"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": LanguageModeling()}, "do not go together"),
        ({"model": Custom(config=toy.MODEL)}, "do not go together"),
        ({"lora": LoRAConfig()}, "lora adapts language models"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_a_model_of_other_channels_or_grid_is_refused(config, tmp_path):
    other = replace(MODEL, in_channels=5, grid=replace(MODEL.grid, layout="gauss"))
    with pytest.raises(ConfigError, match=r"(?s)model grid=.*in_channels=5, the data have 4"):
        Session(replace(config, model=Swin(config=other)), tmp_path)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"window": (4, 4)}, r"config\.window=\(4, 4\), and .* has \(2, 4\)"),
        ({"depth": 1}, r"config\.depth=1, and .* has 2"),
        ({"gelu": "tanh", "norm_eps": 1e-3}, r"(?s)gelu='tanh', and.*norm_eps=0\.001, and"),
    ],
)
def test_weights_of_another_architecture_are_refused_before_a_run(config, trained, told, message):
    source = Swin(config=replace(MODEL, **told), path=str(trained / "export"))
    with pytest.raises(ConfigError, match=message):
        dry_plan(replace(config, model=source))


def test_weights_are_loaded_in_the_type_and_place_of_the_run(config, trained, tmp_path):
    params = params_of(trained)
    model = replace(MODEL, window=None)  # stored as what it comes to
    swin.save(tmp_path / "half", model, params, dtype="bfloat16")
    source = Swin(config=model, path=str(tmp_path / "half"))
    session = Session(replace(config, model=source), tmp_path)
    found = session.initial_state().trained
    for path, leaf in paths(found).items():
        assert leaf.dtype == "float32"
        assert leaf.sharding.mesh.axis_names == session.mesh.axis_names
        np.testing.assert_array_equal(leaf, paths(params)[path].astype("bfloat16"))


def test_a_mesh_that_cuts_windows_is_refused_before_a_run(config):
    with pytest.raises(ConfigError, match="mesh lat=8 must divide the 2 windows"):
        dry_plan(replace(config, mesh=MeshConfig(data=1, lat=8)))


def test_a_model_that_cannot_run_on_its_output_is_refused(config):
    with pytest.raises(ConfigError, match="out_channels=5 must be at most in_channels=4"):
        dry_plan(replace(config, model=Swin(config=replace(MODEL, out_channels=5))))
