# SPDX-License-Identifier: Apache-2.0
"""What a training step changes, as one pytree: created, placed on a mesh, saved by name."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sqzjax.sharding import mirror_shardings
from sqzjax.typing import Leaf, PyTree
from train.ema import Average


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trained", "opt_state", "average", "rejected", "rejected_in_row"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """State after `step` batches. `trained` are the parameters, or the adapter with LoRA."""

    step: Leaf  # int32: batches consumed, also those that were rejected
    trained: Leaf
    opt_state: Leaf
    average: Leaf  # like `trained`, or None
    rejected: Leaf  # int32: non-finite steps in all
    rejected_in_row: Leaf  # int32: of these, directly before now


class Frozen(NamedTuple):
    """Arrays beside the trained ones, which no step changes; None where there are none."""

    base: Any = None  # what a LoRA adapter is trained for
    reference: Any = None  # the second model that some objectives need
    tables: Any = None  # what the objective asks for by its method `tables`


def create(trained: PyTree, optimizer: Any, average: Average | None) -> TrainState:
    """Return the state at step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        opt_state=optimizer.init(trained),
        average=None if average is None else average.init(trained),
        rejected=jnp.zeros((), jnp.int32),
        rejected_in_row=jnp.zeros((), jnp.int32),
    )


def place(state: TrainState, trained_shardings: PyTree, mesh: Mesh) -> TrainState:
    """Return the shardings of a (possibly abstract) state: copies of parameters lie beside them."""
    return mirror_shardings(state, state.trained, trained_shardings, mesh)


def with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    """Return the abstract tree with shardings attached."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def to_items(state: TrainState, name: str) -> dict[str, PyTree]:
    """Return the items of a checkpoint; `name` is that of the trained tree: params or lora."""
    rest = {field.name: getattr(state, field.name) for field in fields(state)}
    trained, opt_state = rest.pop("trained"), rest.pop("opt_state")
    train = {key: value for key, value in rest.items() if value is not None}
    return {name: trained, "opt_state": opt_state, "train": train}


def from_items(items: dict[str, PyTree], name: str) -> TrainState:
    """Undo `to_items`."""
    train = {"average": None, **items["train"]}
    return TrainState(trained=items[name], opt_state=items["opt_state"], **train)
