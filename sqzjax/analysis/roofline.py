# SPDX-License-Identifier: Apache-2.0
"""Predict the least time of a forward pass: per operator the slowest of compute and memory.

`time = max(matrix operations / matrix peak, vector operations / vector peak, bytes / bandwidth)`,
summed over operators without overlap between them. Use it to know the ceiling of a method before
running it and to report measured times as a share of that ceiling. Only relative statements are
reliable: launch overhead, sampling and cache misses are not modelled. Costs nothing, needs no jax.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sqzjax.analysis.devices import Hardware
from sqzjax.analysis.numbers import Number
from sqzjax.analysis.operators import Operator, operators
from sqzjax.analysis.workload import Precision, Workload
from sqzjax.models.config import ModelConfig


@dataclass(frozen=True)
class OperatorTime:
    """Predicted seconds of all `operator.count` executions and what they wait for.

    `bound` is "compute", "vector", "memory" or "link".
    """

    operator: Operator
    seconds: Number
    bound: str

    @property
    def intensity(self) -> Number:
        """Operations per byte of memory traffic; 0 when nothing moves."""
        return self.operator.operations / self.operator.bytes if self.operator.bytes else 0.0


@dataclass(frozen=True)
class Roofline:
    """Predicted times of a forward pass, per operator and in total."""

    hardware: Hardware
    rows: tuple[OperatorTime, ...]

    @property
    def seconds(self) -> Number:
        """Least time of the whole pass."""
        return sum(row.seconds for row in self.rows)

    @property
    def flops(self) -> Number:
        """Matrix operations of the whole pass."""
        return sum(row.operator.flops * row.operator.count for row in self.rows)

    @property
    def operations(self) -> Number:
        """Matrix and vector operations of the whole pass."""
        return sum(row.operator.operations * row.operator.count for row in self.rows)

    @property
    def bytes(self) -> Number:
        """Memory traffic of the whole pass."""
        return sum(row.operator.bytes * row.operator.count for row in self.rows)

    @property
    def intensity(self) -> Number:
        """Operations per byte of the whole pass."""
        return self.operations / self.bytes if self.bytes else 0.0

    @property
    def bound(self) -> str:
        """What most of the time is spent waiting for."""
        spent: dict[str, Number] = {}
        for row in self.rows:
            spent[row.bound] = spent.get(row.bound, 0.0) + row.seconds
        return max(spent, key=lambda name: spent[name])

    def fraction(self, measured_seconds: Number) -> Number:
        """Share of the roofline that a measured time reaches; 1 is the ceiling."""
        return self.seconds / measured_seconds

    def markdown(self) -> str:
        """Table of operators: operations, bytes, intensity, bound and time."""
        lines = [
            "| operator | count | GFLOP | MB | FLOP/B | bound | ms |",
            "| --- | ---: | ---: | ---: | ---: | --- | ---: |",
        ]
        for row in self.rows:
            op = row.operator
            lines.append(
                f"| {op.name} | {op.count} | {op.operations * op.count / 1e9:.4g} | "
                f"{op.bytes * op.count / 1e6:.4g} | {row.intensity:.4g} | {row.bound} | "
                f"{row.seconds * 1e3:.4g} |"
            )
        total = f"{self.operations / 1e9:.4g} | {self.bytes / 1e6:.4g} | {self.intensity:.4g}"
        lines.append(f"| total | | {total} | {self.bound} | {self.seconds * 1e3:.4g} |")
        return "\n".join(lines)


def roofline(ops: Iterable[Operator], hardware: Hardware) -> Roofline:
    """Return the least time of each operator on `hardware`, and what bounds it."""
    return Roofline(hardware, tuple(_time(op, hardware) for op in ops))


def _time(op: Operator, hardware: Hardware) -> OperatorTime:
    peak = hardware.peak_flops
    if op.low_precision and hardware.peak_int8:
        peak = hardware.peak_int8
    if op.link_bytes and not hardware.link_bandwidth:
        raise ValueError(
            f"link_bandwidth=0 of {hardware.name!r} must be > 0 for tensor parallelism; "
            "give the bytes/s between two devices"
        )
    times = {
        "memory": op.bytes / hardware.bandwidth,
        "compute": op.flops / peak,
        "vector": op.vector_flops / hardware.peak_vector if hardware.peak_vector else 0.0,
        "link": op.link_bytes / hardware.link_bandwidth if op.link_bytes else 0.0,
    }
    bound = max(times, key=lambda name: times[name])
    return OperatorTime(op, times[bound] * op.count, bound)


@dataclass(frozen=True)
class Footprint:
    """Bytes a device must hold: parameters, KV cache, and the largest live activations."""

    weights: Number
    kv: Number
    activations: Number

    @property
    def total(self) -> Number:
        """All three together."""
        return self.weights + self.kv + self.activations


def footprint(
    model: ModelConfig,
    precision: Precision,
    workload: Workload,
    *,
    capacity: int | None = None,
) -> Footprint:
    """Return the memory needed by `workload` with a cache of `capacity` slots (default: context).

    Weights include the embedding. Activations are those live at once inside one layer (input,
    residual and the widest pair of intermediates) or at the head, whichever is more.
    """
    ops = operators(model, precision, workload)
    weights = sum(op.weight_bytes * op.count for op in ops)
    table = model.embedding_size * model.hidden_size * precision.other_bits / 8
    # A tied table is the head's kernel: count it once, whether or not this pass runs the head.
    if not (model.tie_embeddings and workload.head_rows):
        weights += table / workload.tensor_parallel
    if not model.tie_embeddings and not workload.head_rows:
        weights += precision.weight_bytes(
            model.hidden_size, model.embedding_size // workload.tensor_parallel
        )
    kv = _cache_bytes(model, precision, workload, capacity or workload.context)
    return Footprint(weights, kv, _live_activations(model, precision, workload))


def _cache_bytes(
    model: ModelConfig, precision: Precision, workload: Workload, capacity: int
) -> Number:
    width = max(1, model.num_kv_heads // workload.tensor_parallel) * model.head_dim
    total = 0.0
    for window in model.layer_windows:
        # A ring must still hold what the oldest of the new tokens sees.
        slots = capacity if window is None else min(capacity, window + workload.queries)
        total += 2 * workload.batch * precision.kv_bytes(slots, width)
    return total


def _live_activations(model: ModelConfig, precision: Precision, workload: Workload) -> Number:
    devices = workload.tensor_parallel
    attention = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim / devices
    widest = max(attention, 2 * model.intermediate_size / devices)
    values = workload.batch * workload.queries * (2 * model.hidden_size + widest)
    logits = workload.batch * workload.head_rows * model.embedding_size / devices
    return max(values * precision.activation_bits / 8, logits * 4)


def decode_bytes(model: ModelConfig, precision: Precision, batch: int, context: int) -> Number:
    """Bytes one decode step cannot avoid: every kernel and the whole cache read, one token written.

    `context` counts the new token. Activations, which stay on chip, are left out.
    """
    work = Workload(phase="decode", batch=batch, context=context)
    ops = operators(model, precision, work)
    return sum(op.count * (op.weight_bytes + op.kv_read + op.kv_write) for op in ops)


def training_flops(model: ModelConfig, batch: int, seq_len: int, *, causal: bool = False) -> Number:
    """Matrix operations of one training step: forward once, backward twice as much.

    `causal=False` counts every score, the usual convention of MFU; recomputation (remat) is not
    counted, so MFU stays comparable between remat policies.
    """
    work = Workload(
        phase="prefill", batch=batch, context=seq_len, logit_rows=seq_len, causal=causal
    )
    ops = operators(model, Precision(), work)
    return 3 * sum(op.flops * op.count for op in ops)
