# SPDX-License-Identifier: Apache-2.0
"""The training step of a configuration, compiled for TPU chips that are not there.

`python -m train.plan_compile REQUEST.json RESULT.json`, started by `train.topology_plan`. It is the
step that the run would compile: its objective, reference model, adapters, optimizer, accumulation
and mesh. Data and weights are shapes, so neither need exist.
"""

import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sqzjax import config as configs
from sqzjax.analysis.aot import Program, answer, topology_mesh
from train.config import TrainConfig
from train.families import family_of
from train.plan import lay_out
from train.session import abstract_batch, build_step


def build(request: dict[str, Any]) -> tuple[Program, Mesh]:
    """Return the step of the requested configuration, and the mesh it runs on."""
    config = configs.load(TrainConfig, request["config"])
    mesh = topology_mesh(request["topology"], config.mesh)
    return train_program(config, mesh), mesh


def train_program(config: TrainConfig, mesh: Mesh) -> Program:
    """Return the step of a run on `mesh`; ValueError where the run does not suit it."""
    family = family_of(config)
    model = family.define(config.resolve_model(), config.execution)
    layout = lay_out(config, model, mesh)
    state, frozen = layout.state, layout.frozen
    batch = abstract_batch(config, family.columns(config), mesh)
    parts = {
        "trained parameters": state.trained,
        "frozen parameters": frozen,
        "optimizer": state.opt_state,
        "average": state.average,
        "batch": batch,
    }
    return Program(
        build_step(config, model).train,
        (state, frozen, batch),
        (jax.tree.map(lambda leaf: leaf.sharding, state), None),
        (0,),
        parts,
    )


if __name__ == "__main__":
    answer(*map(Path, sys.argv[1:]), build=build)
