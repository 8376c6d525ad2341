# SPDX-License-Identifier: Apache-2.0
"""Folders of emulators: what is written comes back, and what is wrong is named."""

import json
import os
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io import swin
from sqzjax.models import Execution, SwinConfig, SwinEmulator, stack_layers
from sqzjax.sphere import Grid

CONFIG = SwinConfig(
    grid=Grid(latitudes=4, longitudes=8, layout="region", north=50.0, west=-10.0, spacing=0.5),
    in_channels=3,
    out_channels=2,
    embed_dim=8,
    depth=3,
    num_heads=2,
    context=2,
    patch_size=2,
    window=(1, 2),
    gelu="tanh",
    norm_eps=1e-5,
)


@partial(jax.jit, static_argnums=0)
def initial(model, seed):
    """Random parameters, as one program."""
    return model.init_params(jax.random.key(seed))


@pytest.fixture
def folder(tmp_path):
    params = initial(SwinEmulator(CONFIG), 0)
    swin.save(tmp_path / "emulator", CONFIG, params)
    return tmp_path / "emulator"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("position", [True, False])
def test_round_trip_is_exact(tmp_path, position):
    config = replace(CONFIG, position=position)
    single = SwinEmulator(config, Execution(scan_layers=False, param_dtype="bfloat16"))
    params = initial(single, 1)
    for _ in range(2):  # the second time in place of the first
        swin.save(tmp_path / "emulator", config, params, overwrite=True)
    found, again = swin.load(tmp_path / "emulator", execution=single.execution, verify=True)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    _, stacked = swin.load(tmp_path / "emulator", dtype="float32")
    wanted = jax.tree.map(lambda leaf: leaf.astype("float32"), stack_layers(params))
    jax.tree.map(np.testing.assert_array_equal, stacked, wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "vit"}, "arch='vit' is not supported"),
        ({"depth": 0}, "depth=0 must lie between"),
        ({"window_size": [3, 2]}, "must divide the 2 x 4 patches"),
        ({"window_size": "big"}, "window_size='big' must be two integers"),
        ({"window_size": None}, "patches ([9, 18])"),
        ({"num_heads": None}, "num_heads is missing; set it to what"),
        ({"use_big_skip_conv": True}, "use_big_skip_conv=True is not supported; only False"),
        ({"sqzjax": {"geulu": "erf"}}, "sqzjax has ['geulu']; it may have grid, gelu and norm_eps"),
        ({"sqzjax": {"grid": {"layout": "cells", "west": "a"}}}, "sqzjax.grid: "),
        ({"sqzjax": {"gelu": "relu"}}, "sqzjax.gelu='relu'"),
        ({"sqzjax": {"grid": {"layout": "flat"}}}, "sqzjax.grid.layout='flat' is none of"),
        ({"img_size": [5, 8], "num_heads": 3}, "num_heads=3 must divide"),
    ],
)
def test_bad_configurations(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(ConfigError) as error:
        swin.load(folder)
    assert words in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 4}, "16 tensors missing: blocks.3."),
        ({"depth": 2}, "16 tensors unexpected: blocks.2."),
        ({"coord_pos_embed": False}, "coord_pos_embed is false in config.json; pos_embed.proj"),
        ({"in_chans": 4}, "patch_embed.proj.conv.weight is [8, 3, 2, 2], expected [8, 4, 2, 2]"),
    ],
)
def test_tensors_that_do_not_fit(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        swin.load(folder)
    assert words in str(error.value)


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    params = initial(SwinEmulator(CONFIG), 0)
    with pytest.raises(CheckpointError, match=r"no config\.json\) and is not replaced"):
        swin.save(tmp_path, CONFIG, params, overwrite=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="choose another or overwrite=True"):
        swin.save(tmp_path, CONFIG, params)
    with pytest.raises(ValueError, match="params do not fit the config: "):
        swin.save(tmp_path / "new", replace(CONFIG, depth=2), params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]


def test_a_replacement_that_fails_leaves_the_old_folder(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    params = initial(SwinEmulator(CONFIG), 1)
    with pytest.raises(OSError, match="full"):
        swin.save(folder, CONFIG, params, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_umask_holds_for_a_new_folder(tmp_path):
    before = os.umask(0o027)
    try:
        swin.save(tmp_path / "new", CONFIG, initial(SwinEmulator(CONFIG), 0))
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750


def test_more_channels_out_than_in(tmp_path):
    """The original has no rule against it; such a model only cannot run on its own output."""
    config = replace(CONFIG, in_channels=2, out_channels=3)
    params = initial(SwinEmulator(config), 0)
    swin.save(tmp_path / "new", config, params)
    assert swin.load(tmp_path / "new")[0] == config
    with pytest.raises(ValueError, match="out_channels=3 must be at most in_channels=2"):
        config.check_feedback()
