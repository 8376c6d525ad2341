# SPDX-License-Identifier: Apache-2.0
"""What a run will need, before anything is compiled: parameter counts and bytes per device.

Parameters, optimizer and average are exact; activations are an estimate of what the backward pass
keeps (within about a factor of two).
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sqzjax.sharding import check_batch, check_unused, make_mesh, shardings
from sqzjax.typing import PyTree
from train import lora, state
from train.config import TrainConfig
from train.ema import Average
from train.families import family_of
from train.state import Frozen, TrainState


@dataclass(frozen=True)
class Layout:
    """Abstract state and frozen parameters with their shardings, and the mesh they lie on."""

    mesh: Mesh
    state: TrainState
    frozen: Frozen


class Advice(Protocol):
    """A plan that can say what to change when its run does not fit."""

    def out_of_memory(self) -> str:
        """Return the message."""
        ...


@dataclass(frozen=True)
class Plan:
    """Counts over all devices; bytes on the fullest device."""

    num_params: int
    num_trained: int
    devices: int
    parameter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    average_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    unit: str
    units_per_step: int
    units: int

    @property
    def total_bytes(self) -> int:
        """Estimated need of one device."""
        return (
            self.parameter_bytes
            + self.optimizer_bytes
            + self.gradient_bytes
            + self.average_bytes
            + self.activation_bytes
        )

    def describe(self) -> str:
        """Return the plan as lines of text."""
        lines = (
            ("parameters", f"{self.num_params:,} ({self.num_trained:,} trained)"),
            (self.unit, f"{self.units:,} ({self.units_per_step:,} per step)"),
            ("devices", f"{self.devices} (bytes below are for one of them)"),
            ("parameter bytes", readable(self.parameter_bytes)),
            ("optimizer bytes", readable(self.optimizer_bytes)),
            ("gradient bytes", readable(self.gradient_bytes)),
            ("average bytes", readable(self.average_bytes)),
            ("activation bytes", f"{readable(self.activation_bytes)} (estimate)"),
            ("total bytes", f"{readable(self.total_bytes)} (estimate)"),
            ("checkpoint bytes", f"{readable(self.checkpoint_bytes)} per step kept, all devices"),
        )
        return "\n".join(f"{name:18}{value}" for name, value in lines)

    def out_of_memory(self) -> str:
        """Return the message of a run that does not fit, with the settings to change."""
        sizes = {
            "parameters": self.parameter_bytes,
            "optimizer": self.optimizer_bytes,
            "gradients": self.gradient_bytes,
            "average": self.average_bytes,
            "activations (estimate)": self.activation_bytes,
        }
        listed = ", ".join(f"{name} {readable(size)}" for name, size in sizes.items() if size)
        return (
            f"out of memory; one device needs: {listed}. Against activations raise accumulation, "
            "set execution.remat: full or dots, or lower batch_size or seq_len; against the rest "
            "raise mesh.fsdp, use optimizer.moment_dtype: bfloat16 or kind: adafactor, drop ema, "
            "or train adapters with lora"
        )


def reference_model(config: TrainConfig) -> Any:
    """Return the definition of the objective's second model; None where it has none."""
    if config.reference is None:
        return None
    return family_of(config).define(config.reference.resolve(), config.execution)


def lay_out(config: TrainConfig, model: Any, mesh: Mesh | None = None) -> Layout:
    """Return where everything will lie; ValueError when the mesh does not suit model or batch.

    `mesh` is that of the configuration over the devices of this machine unless given.
    """
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    check_batch(config.batch_size, mesh, config.accumulation)
    params = model.abstract_params()
    trained = params
    if config.lora is not None:
        settings = config.lora
        trained = jax.eval_shape(lambda: lora.init(settings, params, jax.random.key(0)))
    check_unused(config.rules, params, trained)
    average = None if config.ema is None else Average(config.ema)
    optimizer = config.optimizer.build()
    abstract = jax.eval_shape(lambda tree: state.create(tree, optimizer, average), trained)
    placed = state.place(abstract, shardings(trained, mesh, config.rules), mesh)

    def lie(tree: PyTree) -> PyTree:
        return state.with_shardings(tree, shardings(tree, mesh, config.rules))

    reference = reference_model(config)
    frozen = Frozen(
        base=None if config.lora is None else lie(params),
        reference=None if reference is None else lie(reference.abstract_params()),
        tables=_abstract_tables(config, model, mesh),
    )
    return Layout(mesh, state.with_shardings(abstract, placed), frozen)


def _abstract_tables(config: TrainConfig, model: Any, mesh: Mesh) -> PyTree:
    """Return the arrays that the objective needs, whole on every device; None if it needs none."""
    tables = getattr(config.objective, "tables", None)
    found = None if tables is None else tables(model.config, abstract=True)
    return state.with_shardings(
        found, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), found)
    )


def make_plan(config: TrainConfig, model: Any, layout: Layout) -> Plan:
    """Count what `layout` needs."""
    trained = layout.state.trained
    family = family_of(config)
    params = trained if layout.frozen.base is None else layout.frozen.base
    rows = config.batch_size // config.accumulation
    rows //= layout.mesh.shape["data"] * layout.mesh.shape["fsdp"]
    activations = family.activation_bytes(config, model, rows)
    units = family.units_per_step(config)
    saved = [trained, layout.state.opt_state, layout.state.average]
    return Plan(
        num_params=_count(params),
        num_trained=_count(trained),
        devices=layout.mesh.size,
        parameter_bytes=_bytes(trained) + _bytes(layout.frozen),
        optimizer_bytes=_bytes(layout.state.opt_state),
        gradient_bytes=_bytes(trained),
        average_bytes=_bytes(layout.state.average),
        activation_bytes=activations // layout.mesh.shape["tensor"],
        checkpoint_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved)),
        unit=family.unit,
        units_per_step=units,
        units=units * config.steps,
    )


def readable(size: int) -> str:
    """Return a number of bytes as text."""
    if size < 1000:
        return f"{size} B"
    power = min(4, int(math.log(size, 1000)))
    return f"{size / 1000**power:.2f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: PyTree) -> int:
    """Bytes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
