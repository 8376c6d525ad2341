# SPDX-License-Identifier: Apache-2.0
"""Runs that branch from another run's checkpoint, and the checkpoints that are kept for them."""

from dataclasses import replace

import pytest

from sqzjax.errors import CheckpointError, ConfigError, DataError
from sqzjax.io import checkpoint
from tests.train import toy
from train.config import CheckpointConfig
from train.continual import Branch, Continual
from train.run import run

TRUNK, BRANCHED, LAST = 8, 4, 10
KEPT = CheckpointConfig(interval=0, keep=1, keep_steps=(BRANCHED,), async_save=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Configuration of a trunk and its working directory, trained to the end."""
    folder = tmp_path_factory.mktemp("trunk")
    schedule = Continual(learning_rate=3e-3, warmup_steps=2)
    text = toy.write_text(folder)
    config = toy.run_config(text, steps=TRUNK, schedule=schedule, checkpoint=KEPT, ema=0.5)
    assert run(config, workdir=folder / "run") == 0
    return config, folder / "run"


def state_of(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    return checkpoint.restore_params(folder).items["params"]


def branch(base, **changes):
    config, workdir = base
    settings = {"branch": Branch(run=str(workdir), step=BRANCHED), "steps": LAST}
    return replace(config, checkpoint=CheckpointConfig(interval=0), **{**settings, **changes})


def test_the_steps_of_branches_stay(base):
    _, workdir = base
    assert checkpoint.Checkpointer(workdir / "checkpoints").steps() == [BRANCHED, TRUNK]


def test_a_constant_branch_is_the_trunk(base, tmp_path):
    """Parameters, moments, average, step and data go on as if nothing had happened."""
    config, workdir = base
    constant = replace(config.schedule, cooldown_steps=0)
    assert run(branch(base, steps=TRUNK, schedule=constant), workdir=tmp_path) == 0
    assert toy.same_bytes(state_of(tmp_path, TRUNK), state_of(workdir, TRUNK))


def test_a_cooled_branch_is_one_run_with_that_schedule(base, tmp_path):
    config, _ = base
    cooled = replace(config.schedule, cooldown_steps=3)
    assert run(branch(base, schedule=cooled), workdir=tmp_path / "branch") == 0
    whole = replace(config, steps=LAST, schedule=cooled)
    assert run(whole, workdir=tmp_path / "whole") == 0
    assert toy.same_bytes(state_of(tmp_path / "branch", LAST), state_of(tmp_path / "whole", LAST))


@pytest.mark.slow
def test_a_trunk_schedule_cools_a_whole_branch(base, tmp_path):
    config, _ = base
    whole_branch = replace(config.schedule, cooldown_steps=LAST - BRANCHED)
    assert run(branch(base), workdir=tmp_path / "implied") == 0
    assert run(branch(base, schedule=whole_branch), workdir=tmp_path / "told") == 0
    assert toy.same_bytes(state_of(tmp_path / "implied", LAST), state_of(tmp_path / "told", LAST))


@pytest.mark.slow
def test_an_interrupted_branch_goes_on(base, tmp_path):
    config = branch(base)
    saved = replace(config, checkpoint=CheckpointConfig(interval=3, async_save=False))
    assert run(config, workdir=tmp_path / "whole") == 0
    assert run(saved, workdir=tmp_path / "split") == 0
    checkpoints = tmp_path / "split" / "checkpoints"
    (checkpoints / str(LAST)).rename(tmp_path / "lost")
    assert checkpoint.Checkpointer(checkpoints).steps() == [6, 9]
    assert run(saved, workdir=tmp_path / "split") == 0
    assert toy.same_bytes(state_of(tmp_path / "split", LAST), state_of(tmp_path / "whole", LAST))


def test_what_a_branch_cannot_start_from(base, tmp_path):
    _, workdir = base
    with pytest.raises(ConfigError, match="no checkpoints"):
        run(branch(base, branch=Branch(run=str(tmp_path), step=4)), workdir=tmp_path / "a")
    with pytest.raises(CheckpointError, match="no complete step 5"):
        run(branch(base, branch=Branch(run=str(workdir), step=5)), workdir=tmp_path / "b")
    with pytest.raises(DataError, match="seed"):
        run(branch(base, seed=7), workdir=tmp_path / "c")
    with pytest.raises(ValueError, match="must be below steps"):
        branch(base, steps=BRANCHED)
