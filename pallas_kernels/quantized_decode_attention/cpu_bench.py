# SPDX-License-Identifier: Apache-2.0
"""Measure decode attention over packed caches on a CPU: time and memory against float32 caches.

One layer, full caches, one new token. All candidates run in turn, round by round, so that a machine
whose speed drifts treats them alike; ratios are medians over rounds. Next to the wall clock stands
the processor time, which other processes hardly change. PyTorch attends to float32 in an
environment of its own (see `cpu_bench_torch.py`); its threads suffer most from other processes.

    python -m pallas_kernels.quantized_decode_attention.cpu_bench --torch-python PYTHON

Writes `pallas_kernels/results/quantized_cpu.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.run import PACKAGE, describe_run
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.packing import words_of
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quantized_decode_attention.api import quantized_decode_attention
from pallas_kernels.rotary import Rotary

WORKER = Path(__file__).with_name("cpu_bench_torch.py")
HEADS, KV_HEADS, WIDTH = 32, 8, 128
_PAUSE = 0.05  # seconds in which PyTorch's threads may stop spinning


@dataclass(frozen=True)
class Form:
    """How keys and values are packed: rows and columns that share a scale, 0 for all."""

    bits: int
    keys: tuple[int, int] = (1, 0)
    values: tuple[int, int] = (1, 0)
    table: bool = False
    exact: int = 0  # entries of a row that have a slot of their own
    rotate: bool = False  # keys are those before rotation


FORMS = {
    "int8": Form(8),
    "int4": Form(4),
    "int3": Form(3),
    "kivi8": Form(8, (32, 1), (1, 32)),
    "kivi4": Form(4, (32, 1), (1, 32)),
    "kivi3": Form(3, (32, 1), (1, 32)),
    "kivi2": Form(2, (32, 1), (1, 32)),
    "kivi4_before_rotation": Form(4, (128, 1), (1, 128), rotate=True),
    "kvquant4": Form(4, (0, 1), table=True, exact=2, rotate=True),
    "kvquant3": Form(3, (0, 1), table=True, exact=2, rotate=True),
}


def make(form: Form, shared: tuple[int, int], slots: int) -> QTensor:
    """Return packed keys or values of arbitrary content."""
    down, across = shared
    columns = WIDTH // (across or WIDTH)
    factors = (1, KV_HEADS, slots // (down or slots), columns)
    codes = (1, KV_HEADS, slots, words_of(WIDTH, form.bits))
    # No numpy arrays on the way: what they leave behind would count as memory of the cache.
    words = jnp.full(codes, 0x76543210, jnp.uint32)
    table = residual = place = None
    if form.table:
        table = jnp.linspace(-1, 1, 2**form.bits)[None, None, None]
    if form.exact:
        residual = jnp.full((1, KV_HEADS, slots, form.exact), 0.5, jnp.float16)
        place = jnp.full(residual.shape, 3, jnp.uint8)
    scale = jnp.full(factors, 2.0**-form.bits, jnp.float16)
    offset = jnp.full(factors, -0.5, jnp.float16)
    return QTensor(words, scale, offset, table, residual, place, form.bits, WIDTH)


def candidate(name: str, slots: int) -> tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]:
    """Return the function of a candidate, and what makes its arguments."""
    length = jnp.full(1, slots, jnp.int32)
    query = (1, 1, HEADS, WIDTH)
    if name == "float32":
        shape = (1, KV_HEADS, slots, WIDTH)

        def dense(q, k, v, length):
            return decode_attention(q, k, v, length=length).out

        return dense, lambda: (jnp.ones(query), jnp.full(shape, 0.1), jnp.full(shape, 0.2), length)
    form = FORMS[name]
    rotary = Rotary(tuple(1e4 ** -(np.arange(WIDTH // 2) / (WIDTH / 2)))) if form.rotate else None

    def packed(q, k, v, length):
        places = {"query_positions": length[:, None] - 1, "rotary": rotary} if rotary else {}
        limits = length[:, None]
        return quantized_decode_attention(q, k, v, length=length, limits=limits, **places).out

    def arguments():
        keys, values = make(form, form.keys, slots), make(form, form.values, slots)
        return jnp.ones(query), keys, values, length

    return packed, arguments


class Torch:
    """PyTorch's attention in a process of its own; `run` returns the seconds of one call."""

    def __init__(self, python: str, slots: int):
        command = [python, str(WORKER), "--slots", str(slots), "--threads", str(os.cpu_count())]
        command += ["--heads", str(HEADS), "--kv-heads", str(KV_HEADS), "--width", str(WIDTH)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._ask("version")

    def run(self, name: str) -> float:
        """Return the seconds of one call of `torch_sdpa` or `torch_matmul`."""
        return float(self._ask(name))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, word: str) -> str:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the empty answer below reports it
        answer = self._process.stdout.readline().strip()
        if not answer:
            self._process.communicate()
            raise RuntimeError("the PyTorch worker ended; its message is above")
        return answer


def measure(names: list[str], slots: int, rounds: int, peer: Torch | None) -> dict[str, Any]:
    """Return rows of times and compiled sizes by candidate."""
    runs, rows = {}, {}
    for name in names:
        fn, arguments = candidate(name, slots)
        given = arguments()
        compiled = jax.jit(fn).lower(*given).compile()
        sizes: Any = compiled.memory_analysis()
        cache = sum(leaf.nbytes for leaf in jax.tree.leaves(given[1:3]))
        rows[name] = {"cache_bytes": cache, "temporary_bytes": sizes.temp_size_in_bytes}
        runs[name] = lambda compiled=compiled, given=given: compiled(*given)
        jax.block_until_ready(runs[name]())
    seconds: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    theirs: dict[str, list[float]] = {"torch_sdpa": [], "torch_matmul": []} if peer else {}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(runs[name]())
            seconds[name].append(time.perf_counter() - start[0])
            busy[name].append(time.process_time() - start[1])
        for name in theirs:
            assert peer
            theirs[name].append(peer.run(name))
            time.sleep(_PAUSE)
    for name in names:
        rows[name] |= _times(seconds[name], seconds["float32"], theirs.get("torch_sdpa"))
        rows[name]["processor_seconds"] = statistics.median(busy[name])
        rows[name]["processor_ratio"] = _ratio(busy[name], busy["float32"])
    for name, values in theirs.items():
        rows[name] = _times(values, seconds["float32"], None)
    return rows


def _times(seconds: list[float], dense: list[float], sdpa: list[float] | None) -> dict[str, Any]:
    row = {"median_seconds": statistics.median(seconds), "least_seconds": min(seconds)}
    row["ratio_to_float32"] = _ratio(seconds, dense)
    if sdpa:
        row["ratio_to_torch_sdpa"] = _ratio(seconds, sdpa)
    return row


def _ratio(these: list[float], those: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def resident(name: str, slots: int) -> int:
    """Return the bytes by which inputs and five calls raise this process' peak of memory.

    Linux alone. The program is compiled before, so that the compiler does not count.
    """
    fn, arguments = candidate(name, slots)
    compiled = jax.jit(fn).lower(*jax.eval_shape(arguments)).compile()
    before = _status("VmRSS")
    given = jax.block_until_ready(arguments())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making them
    for _ in range(5):
        jax.block_until_ready(compiled(*given))
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--torch-python", metavar="PYTHON", help="interpreter of an environment with PyTorch")
    add("--slots", type=int, default=16384, help="tokens in the cache, a multiple of 1024")
    add("--rounds", type=int, default=31)
    add("--only", nargs="*", choices=sorted(FORMS), default=list(FORMS))
    add("--out", type=Path, default=PACKAGE / "results" / "quantized_cpu.json")
    add("--resident", metavar="FORM", help="print the resident bytes of one candidate alone")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results and a line for each candidate; return the exit status."""
    options = _parser().parse_args(arguments)
    if options.resident:
        sys.stdout.write(f"{resident(options.resident, options.slots)}\n")
        return 0
    names = ["float32", *options.only]
    peer = Torch(options.torch_python, options.slots) if options.torch_python else None
    load = os.getloadavg()[0]
    rows = measure(names, options.slots, options.rounds, peer)
    if peer:
        peer.close()
    command = [sys.executable, "-m", __spec__.name, "--slots", str(options.slots), "--resident"]
    for name in names if sys.platform == "linux" else ():
        done = subprocess.run([*command, name], capture_output=True, text=True, check=True)
        rows[name]["resident_bytes"] = int(done.stdout)
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "width": WIDTH, "slots": options.slots}
    record = {**describe_run(), "cores": os.cpu_count(), "load_average": load}
    record |= {"torch": peer.version if peer else None, "shape": shape, "rounds": options.rounds}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    for name, row in rows.items():
        sys.stdout.write(f"{name}: {json.dumps(row)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
