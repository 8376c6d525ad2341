# SPDX-License-Identifier: Apache-2.0
"""The Swin emulator against dense attention in float64, its symmetries, its counts, its errors."""

import subprocess
import sys
from copy import copy
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import config as configs
from sqzjax.analysis.swin_flops import forward_flops, training_flops
from sqzjax.models import Execution, SwinConfig, SwinEmulator, stack_layers, unstack_layers
from sqzjax.models.swin import _windows, sphere_coordinates
from sqzjax.models.swin_config import swin_shapes
from sqzjax.models.swin_layers import _attend, gelu, shift, shifted_mask, unshift
from sqzjax.sphere import Grid
from tests import tolerances
from tests.sqzjax import swin_reference


def config(**changes) -> SwinConfig:
    fields = {
        "grid": Grid(latitudes=8, longitudes=16, layout="no_south_pole"),
        "in_channels": 4,
        "out_channels": 3,
        "embed_dim": 8,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 2,
        "window": (2, 4),
    }
    return SwinConfig(**{**fields, **changes})


CASES = {
    "plain": {},
    "context": {"context": 3},
    "odd window and depth": {
        "grid": Grid(latitudes=12, longitudes=12, layout="cells"),
        "window": (3, 2),
        "depth": 3,
    },
    "one window": {"window": (4, 8), "context": 2},
    "high window": {"window": (4, 1), "gelu": "tanh"},
    "rows of one": {"window": (1, 4)},
    "default window": {"window": None, "num_heads": None, "depth": 1},
    "learned positions": {"position": False, "context": 2},
    "region": {
        "grid": Grid(latitudes=8, longitudes=16, layout="region", north=60.0, spacing=1.0),
        "mlp_ratio": 1.5,
    },
    "patches of one": {
        "grid": Grid(latitudes=6, longitudes=8),
        "patch_size": 1,
        "window": (3, 4),
        "norm_eps": 1e-5,
    },
}


def unchecked(settings, **changes):
    """Set fields past the type checks of the tests, which users do not have."""
    changed = copy(settings)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    return changed


def random_params(model, seed=0):
    """Parameters far from their start, so that every one of them matters."""
    leaves, tree = jax.tree.flatten(model.abstract_params())
    rng = np.random.default_rng(seed)
    values = [0.4 * rng.normal(size=leaf.shape) + 0.3 for leaf in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(value, jnp.float32) for value in values])


def random_fields(config, batch=2, seed=1):
    shape = (batch, config.context, config.in_channels, *config.grid.shape)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


SLOW = {"high window", "rows of one", "patches of one", "default window"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES]
)
def test_equals_dense_masked_attention(case):
    model = SwinEmulator(config(**CASES[case]), Execution(scan_layers=False))
    params, fields = random_params(model), random_fields(model.config)
    coordinates = sphere_coordinates(model.config.grid, model.config.context)
    wanted = swin_reference.forward(model.config, params, np.asarray(fields), coordinates)
    found = np.asarray(jax.jit(model.forward)(params, fields))
    scale = np.abs(wanted).max()
    atol = tolerances.SWIN_REL
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("depth", "remat"), [(3, "none"), (2, "full"), pytest.param(2, "dots", marks=pytest.mark.slow)]
)
def test_layouts_and_recomputation_agree(depth, remat):
    """Output and gradient of the stacked layout are those of the unrolled one."""
    swin = config(depth=depth)
    unrolled = SwinEmulator(swin, Execution(scan_layers=False))
    stacked = SwinEmulator(swin, Execution(remat=remat))
    params, fields = random_params(unrolled), random_fields(swin)

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.mean(model.forward(p, fields) ** 2)))

    stack = jax.jit(stack_layers)
    wanted = jax.tree.map(np.asarray, stack(gradient(unrolled)(params)))
    found = jax.tree.map(np.asarray, gradient(stacked)(stack(params)))
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a / scale, b / scale, rtol=0, atol=tolerances.SWIN_REL
        ),
        found,
        wanted,
    )


@pytest.mark.parametrize("case", ["plain", "context", "odd window and depth", "one window"])
def test_windows_and_shift_are_undone_bitwise(case):
    """A shift in windows is a roll of the field, and comes back."""
    swin = config(**CASES[case])
    field = np.random.default_rng(3).normal(size=(2, swin.context, *swin.patches, 5))
    field = field.astype(np.float32)
    down, right = swin.shift
    rolled = np.roll(field, (-down, -right), axis=(2, 3))

    @jax.jit
    def run(field, rolled):
        grouped = _windows(field, swin)
        moved = shift(grouped, swin)
        return grouped, moved, unshift(moved, swin), _windows(rolled, swin)

    grouped, moved, back, wanted = run(field, rolled)
    np.testing.assert_array_equal(moved, wanted)
    np.testing.assert_array_equal(back, grouped)


def test_equivariant_under_rolls_of_whole_windows():
    model = SwinEmulator(config(depth=4))
    params, fields = random_params(model), np.asarray(random_fields(model.config))
    coordinates = np.asarray(sphere_coordinates(model.config.grid, 1), np.float32)
    columns = model.config.patch_size * model.config.window_size[1]
    compiled = jax.jit(model.forward)

    def forward(*arguments):
        return np.asarray(compiled(*arguments))

    wanted = np.roll(forward(params, fields, coordinates), columns, axis=-1)
    found = forward(
        params, np.roll(fields, columns, axis=-1), np.roll(coordinates, columns, axis=2)
    )
    scale = np.abs(wanted).max()
    atol = tolerances.SWIN_REL
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=atol)
    unlike = forward(params, np.roll(fields, columns, axis=-1), coordinates)
    assert np.abs(unlike - wanted).max() > 0.01 * scale


def test_nothing_crosses_the_poles():
    """One shifted block: the last rows do not depend on the first, though longitudes wrap."""
    swin = config(context=2)
    model = SwinEmulator(swin, Execution(scan_layers=False))
    params = random_params(model)
    for leaf in ("o", "down"):  # the first block does nothing
        part = params["layers_0"]["attn" if leaf == "o" else "mlp"]
        part[leaf] = jax.tree.map(jnp.zeros_like, part[leaf])

    def place(fields, row, column):
        return model.forward(params, fields)[0, 0, row, column]

    gradient = jax.jit(jax.grad(place))
    fields = np.array(random_fields(swin, batch=1))
    south = np.abs(np.asarray(gradient(fields, -1, 0))).sum(axis=(0, 1, 2))
    north = np.abs(np.asarray(gradient(fields, 0, 0))).sum(axis=(0, 1, 2))
    half = swin.patch_size * swin.shift[0]
    assert not south[:-half].any() and south[-half:].any()
    assert not north[half:].any() and north[:half].any()
    assert south[-half:, -4:].any() and south[-half:, :4].any()  # round the globe
    forward = jax.jit(lambda fields: model.forward(params, fields))
    still = np.asarray(forward(fields))
    fields[..., 0, :] += 1.0
    moved = np.asarray(forward(fields))
    np.testing.assert_array_equal(moved[..., half:, :], still[..., half:, :])


TABLE = {  # embed_dim, depth: parameters in millions, forward operations in 1e12
    (192, 6): (3.12, 0.461),
    (256, 8): (6.91, 0.994),
    (384, 8): (15.08, 2.100),
    (512, 8): (26.40, 3.613),
    (512, 12): (38.99, 5.340),
    (640, 12): (60.54, 8.201),
    (768, 12): (86.80, 11.67),
    (768, 16): (115.13, 15.49),
    (1024, 12): (153.49, 20.45),
    (1024, 16): (203.84, 27.17),
    (1024, 24): (304.53, 40.59),
    (1536, 16): (456.75, 60.31),
}


@pytest.mark.parametrize(("width", "depth"), TABLE)
def test_counts_of_the_published_sizes(width, depth):
    grid = Grid(latitudes=720, longitudes=1440, layout="no_south_pole")
    swin = SwinConfig(grid=grid, in_channels=74, out_channels=71, embed_dim=width, depth=depth)
    params, flops = TABLE[width, depth]
    assert round(swin.counted_params / 1e6, 2) == params
    assert round(forward_flops(swin, heads=16) / 1e12, 3 if flops < 10 else 2) == flops
    assert swin.window_size == (9, 18) and swin.head_dim == 64
    assert training_flops(swin, 5, rollout=2) == pytest.approx(30 * forward_flops(swin))


def test_counts_follow_context_and_learned_positions():
    """The terms of the formula that the published sizes do not have, written out."""
    swin = config(context=3)
    n, e, length = 3 * 32, 8, 3 * 8
    block = 8 * n * e * e + 4 * n * e + 4 * n * length * e + 5 * 2 * length * n
    block += 16 * n * e * e + 37 * n * e + 12 * n * e
    ends = 2 * n * 4 * (4 + 4) * e + 2 * n * e + 2 * 32 * e * 3 * 4
    assert forward_flops(swin) == ends + 2 * block
    table = replace(swin, position=False)
    assert forward_flops(swin) - forward_flops(table) == (2 * 4 * 4 + 1) * n * e
    assert table.counted_params - swin.counted_params == n * e - (4 * 4 * e + e)


@pytest.mark.parametrize(
    "call",
    [
        lambda: forward_flops(config(), heads=0),
        lambda: training_flops(config(), -1),
        lambda: training_flops(config(), 1, rollout=0),
    ],
)
def test_impossible_counts_are_refused(call):
    with pytest.raises(ValueError, match="must be >="):
        call()


@pytest.mark.parametrize(("patch", "window"), [(8, (5, 10)), (2, (18, 36)), (4, (9, 18))])
def test_window_rule(patch, window):
    grid = Grid(latitudes=720, longitudes=1440, layout="no_south_pole")
    fields = {"in_channels": 1, "out_channels": 1, "embed_dim": 64, "depth": 1}
    assert SwinConfig(grid=grid, patch_size=patch, **fields).window_size == window


@pytest.mark.parametrize("case", ["context", "learned positions", "region"])
def test_parameters(case):
    """Shapes, counts and initial values."""
    model = SwinEmulator(config(**CASES[case]))
    params = jax.jit(model.init_params)(jax.random.key(0))
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    assert {path: leaf.shape for path, leaf in flat.items()} == swin_shapes(model.config, True)
    assert sum(leaf.size for leaf in flat.values()) == model.config.num_params
    for path, leaf in flat.items():
        if path.endswith(("bias", "scale")):
            assert (leaf == path.endswith("scale")).all(), path
    weights = np.concatenate([leaf.ravel() for p, leaf in flat.items() if p.endswith("kernel")])
    assert abs(weights.std() / 0.02 - 1) < tolerances.SAMPLED_DEVIATION
    assert abs(weights.mean()) < 0.02 * tolerances.SAMPLED_DEVIATION
    single = SwinEmulator(model.config, Execution(scan_layers=False))
    wanted, found = jax.jit(unstack_layers)(params), jax.jit(single.init_params)
    equal = partial(np.testing.assert_allclose, rtol=tolerances.SAME_DRAW_REL)
    jax.tree.map(equal, found(jax.random.key(0)), wanted)


def test_bfloat16_follows_float32():
    swin = config(embed_dim=32, depth=4, num_heads=4)
    params, fields = random_params(SwinEmulator(swin)), random_fields(swin)
    params = jax.tree.map(lambda leaf: np.float32(0.3) * np.asarray(leaf), params)
    wanted, found = (
        np.asarray(jax.jit(SwinEmulator(swin, Execution(dtype=dtype)).forward)(params, fields))
        for dtype in ("float32", "bfloat16")
    )
    assert found.dtype == np.float32
    scale = np.abs(wanted).max()
    atol = tolerances.SWIN_BFLOAT16_REL
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=atol)


def test_gradient_of_attention():
    """The written-out gradient against JAX's own of the same formula, masked."""
    q, k, v, weight = np.random.default_rng(4).normal(size=(4, 2, 2, 1, 3, 8, 4)).astype("f4")
    allowed = shifted_mask(config(context=1))[:, :1]

    def plain(q, k, v):
        scores = jnp.where(allowed, jnp.einsum("...qh,...kh->...qk", q, k) / 2, -jnp.inf)
        return jnp.vdot(weight, jnp.einsum("...qk,...kh->...qh", jax.nn.softmax(scores), v))

    def written(q, k, v):
        return jnp.vdot(weight, _attend(q, k, v, allowed))

    found, wanted = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (written, plain))
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerances.SWIN_REL)


@pytest.mark.parametrize("kind", ["erf", "tanh"])
def test_gelu_and_its_gradient(kind):
    x = np.linspace(-8, 8, 4001)
    wanted = swin_reference._gelu(x, kind)
    found = jax.jit(gelu, static_argnums=1)(x.astype(np.float32), kind)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerances.GELU)
    slope = jax.grad(lambda v: gelu(v, kind).sum())(jnp.asarray(x, jnp.float32))
    step = 1e-5
    difference = swin_reference._gelu(x + step, kind) - swin_reference._gelu(x - step, kind)
    np.testing.assert_allclose(slope, difference / (2 * step), rtol=0, atol=tolerances.GELU)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": Grid(latitudes=9, longitudes=16)}, "grid.latitudes=9 must be a multiple of"),
        ({"window": (3, 4)}, "window=(3, 4) must divide the 4 x 8 patches"),
        ({"window": (2, 0)}, "window columns=0"),
        ({"num_heads": 3}, "num_heads=3 must divide embed_dim=8; use one of [1, 2, 4, 8]"),
        ({"num_heads": None, "embed_dim": 100}, "embed_dim=100 must be a multiple of 64"),
        ({"window": (4,)}, "window=(4,) must be two integers"),
        ({"window": [2, 4]}, "window=[2, 4] must be two integers"),
        ({"window": 4}, "window=4 must be two integers"),
        ({"gelu": "relu"}, "gelu='relu' must be one of ('erf', 'tanh')"),
        ({"mlp_ratio": 1e300}, "mlp_ratio=1e+300 times embed_dim=8 must lie between 1 and"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must lie between 0 and 1"),
        ({"depth": 0}, "depth=0 must be an integer >= 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0"),
        (
            {"grid": Grid(latitudes=8, longitudes=18), "window": None},
            "9 patches of 2 a row, an odd number",
        ),
    ],
)
def test_bad_configurations(changes, words):
    with pytest.raises(ValueError) as error:
        unchecked(config(), **changes).__post_init__()
    assert words in str(error.value)


def test_bad_input():
    model = SwinEmulator(config())
    params, fields = model.abstract_params(), random_fields(model.config)
    for wrong in (fields[:, :, :3], fields[..., :4, :], jnp.concatenate([fields, fields], 1)):
        with pytest.raises(ValueError, match=r"must be .B, context, in_channels"):
            model.forward(params, wrong)
    for shape in ((2, 8, 16, 4), (1, 8, 16, 3)):
        with pytest.raises(ValueError, match="coordinates have shape"):
            model.forward(params, fields, jnp.zeros(shape))
    for scan in (True, False):
        other = SwinEmulator(model.config, Execution(scan_layers=not scan)).abstract_params()
        with pytest.raises(ValueError, match=f"scan_layers={scan} and parameters of the other"):
            SwinEmulator(model.config, Execution(scan_layers=scan)).forward(other, fields)


def test_configurations_are_read_and_hashed():
    swin = config()
    assert configs.load(SwinConfig, configs.to_dict(swin)) == swin
    assert hash(SwinEmulator(swin)) == hash(SwinEmulator(config()))
    assert SwinEmulator(swin) != SwinEmulator(replace(swin, depth=4))


def test_configuration_and_costs_import_no_jax():
    code = "import sys; import sqzjax.models.swin_config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
