# SPDX-License-Identifier: Apache-2.0
"""The emulator on eight devices: batch, parameters, heads and the field itself are split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import sharding
from sqzjax.analysis import hlo
from sqzjax.models import SwinConfig, SwinEmulator
from sqzjax.sharding import MeshConfig
from sqzjax.sphere import Grid
from tests.tolerances import SHARDED

BATCH = 4
SWIN = SwinConfig(
    grid=Grid(latitudes=32, longitudes=64, layout="no_south_pole"),
    in_channels=4,
    out_channels=3,
    embed_dim=32,
    depth=2,
    num_heads=4,
    context=2,
    patch_size=2,
    window=(4, 8),
)
MESHES = {
    "data": MeshConfig(data=4),
    "fsdp": MeshConfig(data=1, fsdp=4, tensor=2),
    "tensor": MeshConfig(data=2, tensor=4),
    "latitude": MeshConfig(data=2, lat=4),
    "longitude": MeshConfig(data=1, fsdp=2, lon=4),
    "both": MeshConfig(data=2, lat=2, lon=2),
    "all": MeshConfig(data=1, fsdp=1, tensor=2, lat=2, lon=2),
}


def loss(model, params, fields):
    out = model.forward(params, fields)
    return jnp.mean((out - fields[:, -1, : out.shape[1]]) ** 2), out


def step(model, mesh):
    """Return compiled program, loss, output and gradients; on one device for None."""
    params = jax.jit(model.init_params)(jax.random.key(0))
    # Larger than at the start, so that attention matters.
    params = jax.tree.map(lambda x: np.asarray(x) * (4 if x.ndim > 2 else 1), params)
    shape = (BATCH, SWIN.context, SWIN.in_channels, *SWIN.grid.shape)
    fields = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    function = jax.value_and_grad(lambda p, x: loss(model, p, x), has_aux=True)
    if mesh is None:
        return None, jax.jit(function)(params, fields)
    devices = sharding.make_mesh(mesh)
    placed = sharding.shardings(params, devices)
    with jax.set_mesh(devices):
        params = jax.device_put(params, placed)
        fields = jax.device_put(fields, sharding.field_sharding(devices, fields.ndim))
        program = jax.jit(function, out_shardings=(None, placed)).lower(params, fields).compile()
        return program, program(params, fields)


@pytest.fixture(scope="module")
def single():
    return step(SwinEmulator(SWIN), None)[1]


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp",
        "both",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("data", "tensor", "latitude", "longitude", "all")
        ),
    ],
)
def test_a_step_equals_one_device_and_shifts_move_edges_only(mesh, single):
    program, ((found, output), gradients) = step(SwinEmulator(SWIN), MESHES[mesh])
    (wanted, wanted_output), wanted_gradients = single
    atol = SHARDED["float32"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)
    np.testing.assert_allclose(output, wanted_output, rtol=0, atol=atol)
    for path, leaf in sharding.paths(gradients).items():
        wanted_leaf = sharding.paths(wanted_gradients)[path]
        np.testing.assert_allclose(leaf, wanted_leaf, rtol=0, atol=atol, err_msg=path)
    if {"lat", "lon"} & set(MESHES[mesh].axes(8)):
        _check_edges(hlo.parse(program.as_text()).collectives(), MESHES[mesh])


def _check_edges(steps: list[hlo.Collective], mesh: MeshConfig) -> None:
    """No step of communication gathers the field: permutations carry half windows at the edge."""
    samples = BATCH // (mesh.axes(8)["data"] * mesh.fsdp)
    tokens = samples * SWIN.context * SWIN.tokens // (mesh.lat * mesh.lon)
    field_bytes = 4 * tokens * SWIN.embed_dim
    sizes = (SWIN.patches[0] // mesh.lat, SWIN.patches[1] // mesh.lon)
    split = [ways > 1 for ways in (mesh.lat, mesh.lon)]
    edge = max(field_bytes * s / n for s, n, on in zip(SWIN.shift, sizes, split) if on)
    permutes = [step for step in steps if step.kind == "collective-permute"]
    assert permutes and all(step.result_bytes <= edge for step in permutes), permutes
    others = [step for step in steps if step.kind not in ("collective-permute", "all-reduce")]
    assert all(step.result_bytes < field_bytes for step in others), others


def test_windows_must_split_evenly():
    mesh = sharding.make_mesh(MeshConfig(data=1, lat=8))
    model = SwinEmulator(SWIN)
    fields = jnp.zeros((1, SWIN.context, SWIN.in_channels, *SWIN.grid.shape))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"lat=8 must divide the 4 windows"):
        jax.eval_shape(model.forward, model.abstract_params(), fields)


def test_spatial_axes_join_the_mesh_where_they_split():
    assert MeshConfig(data=2).axes(8) == {"data": 2, "fsdp": 1, "tensor": 1}
    split = {"data": 2, "fsdp": 1, "lat": 2, "lon": 2, "tensor": 1}
    assert MeshConfig(lat=2, lon=2).axes(8) == split
    with pytest.raises(ValueError, match="lon=0 must be >= 1"):
        MeshConfig(lon=0)
    with pytest.raises(ValueError, match="lat=3, lon=1 needs a multiple of 3 devices and 8"):
        MeshConfig(lat=3).axes(8)
