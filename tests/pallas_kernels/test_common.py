# SPDX-License-Identifier: Apache-2.0
"""Dispatch, targets and tuning tables."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import common
from pallas_kernels.common import Target, current_target, dispatch

CPU, GPU, TPU = (Target(name, name) for name in ("cpu", "gpu", "tpu"))


def refuse(reason):
    def implementation():
        raise NotImplementedError(reason)

    return implementation


def everything(**changes):
    names = {name: (lambda name=name: name) for name in common.BACKENDS}
    return {**names, **changes}


@pytest.mark.parametrize(
    ("target", "name"), [(CPU, "xla"), (GPU, "mosaic_gpu"), (TPU, "mosaic_tpu")]
)
def test_auto_picks_the_kernel_of_the_device(target, name):
    assert dispatch("op", everything(), target=target) == name


def test_only_cannot_falls_through():
    assert dispatch("op", everything(mosaic_gpu=refuse("odd shape")), target=GPU) == "xla"

    def broken():
        raise RuntimeError("a real fault")

    with pytest.raises(RuntimeError, match="a real fault"):
        dispatch("op", everything(mosaic_gpu=broken), target=GPU)


def test_a_named_backend_that_cannot_run_raises_with_its_reason():
    kernels = everything(mosaic_gpu=refuse("mosaic_gpu: head_dim=7"))
    with pytest.raises(ValueError, match="cannot run op here: mosaic_gpu: head_dim=7; use"):
        dispatch("op", kernels, backend="mosaic_gpu", target=GPU)
    with pytest.raises(ValueError, match="a: no; b: no"):
        dispatch("op", {"xla": refuse("a: no"), "other": refuse("b: no")}, target=CPU)


def test_interpreting_needs_a_name_but_no_device():
    assert dispatch("op", everything(), backend="mosaic_tpu", target=CPU, interpret=True)
    with pytest.raises(ValueError, match="name backend='mosaic_gpu'"):
        dispatch("op", everything(), target=CPU, interpret=True)


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_sizes_need_the_name_of_their_kernel(backend):
    assert dispatch("op", everything(), backend="mosaic_gpu", target=GPU, config="sizes")
    with pytest.raises(ValueError, match=f"config='sizes' .* instead of '{backend}'"):
        dispatch("op", everything(), backend=backend, target=GPU, config="sizes")


def test_kernels_leave_meshes_to_shard_map():
    for size, name in ((1, "mosaic_gpu"), (2, "xla")):
        mesh = AbstractMesh((size,), ("x",), (AxisType.Auto,))
        with jax.sharding.use_abstract_mesh(mesh):
            assert dispatch("op", everything(), target=GPU) == name
    manual = AbstractMesh((2,), ("x",), (AxisType.Manual,))
    with jax.sharding.use_abstract_mesh(manual):
        assert dispatch("op", everything(), target=GPU) == "mosaic_gpu"


def test_the_target_is_the_described_device_or_the_real_one():
    class Hopper(AbstractDevice):
        compute_capability = "9.0"

    device = Hopper(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert current_target() == Target("gpu", "NVIDIA H200", (9, 0), 132)
    assert current_target().platform == "cpu"


def test_tuned_sizes_come_from_the_device_file(tmp_path, monkeypatch):
    table = {"op": {"shape": {"block": 64}}}
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "nvidia_h200.json").write_text(json.dumps(table))
    monkeypatch.setattr(common.resources, "files", lambda package: tmp_path)
    common.tuning_table.cache_clear()
    h200 = Target("gpu", "NVIDIA H200")
    assert common.tuned("op", "shape", h200) == {"block": 64}
    assert common.tuned("op", "other", h200) is None
    assert common.tuned("op", "shape", TPU) is None
    common.tuning_table.cache_clear()


def test_the_package_needs_jax_and_numpy_alone():
    code = (
        "import sys, pallas_kernels.decode_attention, pallas_kernels.common\n"
        "heavy = {'flax', 'pydantic', 'jaxtyping', 'libtpu', 'jax_plugins', 'sqzjax', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_example_of_the_readme_runs():
    """Its lines, one after the other, on arrays of the shapes that its comments give."""
    text = (Path(common.__file__).parent / "README.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    x, kernel = jnp.ones((2, 256)), np.ones((256, 128), np.float32)
    q, (k, v) = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 2, 2, 16, 8))
    names = {"q": q, "k": k, "v": v, "x": x, "kernel": kernel, "lengths": jnp.full(2, 16)}
    for line in example.splitlines():
        if line.startswith("out, lse = attention"):
            names |= dict.fromkeys("qkv", jnp.ones((2, 4, 8, 8)))
        exec(line, names)
    np.testing.assert_allclose(names["y"], x @ kernel, rtol=1e-3)
