# SPDX-License-Identifier: Apache-2.0
"""The Swin weather emulator (arXiv 2603.25687): gridded states in, the next state out.

`SwinEmulator` is frozen and hashable; parameters are a plain nested dict, an argument and a result.
Pick it for scaling studies on the sphere: one resolution throughout, cost linear in the grid.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.models.config import Execution
from sqzjax.models.layout import unstack_layers
from sqzjax.models.swin_config import COORDINATES, SwinConfig, swin_shapes
from sqzjax.models.swin_layers import block, linear, pin
from sqzjax.sharding_config import SPATIAL_AXES
from sqzjax.sphere.grid import Grid
from sqzjax.typing import Array, Float, Key, Params, PyTree

_DEVIATION = 0.02
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class SwinEmulator:
    """A Swin emulator; see `forward`."""

    config: SwinConfig
    execution: Execution = Execution()

    def init_params(self, key: Key) -> Params:
        """Create parameters: weights normal with deviation 0.02, biases 0, norm gains 1.

        Published as truncated at 2, which is 100 deviations.
        """
        dtype = jnp.dtype(self.execution.param_dtype)
        params: Params = {}
        for index, (path, shape) in enumerate(swin_shapes(self.config, True).items()):
            *parents, leaf = path.split("/")
            node = params
            for name in parents:
                node = node.setdefault(name, {})
            if leaf in ("scale", "bias"):
                node[leaf] = jnp.full(shape, leaf == "scale", dtype)
            else:
                normal = jax.random.normal(jax.random.fold_in(key, index), shape)
                node[leaf] = (_DEVIATION * normal).astype(dtype)
        return params if self.execution.scan_layers else unstack_layers(params)

    def abstract_params(self) -> PyTree:
        """Return shapes and dtypes of the parameters without allocating them."""
        return jax.eval_shape(self.init_params, jax.random.key(0))

    def forward(
        self,
        params: Params,
        fields: Float[Array, "B T C H W"],
        coordinates: Float[Array, "_ _ _ _"] | None = None,  # T H W 4
    ) -> Float[Array, "B O H W"]:
        """Return the state after the last one of `fields`, float32, in their (normalised) units.

        Channels of `fields`: prognostic ones, then constants. `coordinates` default to those of
        the grid (`sphere_coordinates`); without `config.position` they are not used. ValueError
        for other shapes, parameters of the other layout, a mesh that cuts through windows.
        """
        config = self.config
        self._check(params, fields, coordinates)
        with jax.named_scope("embed"):
            x = pin(linear(_patches(pin(fields, 3), config, self.execution.dtype), params["patch"]))
            x = pin(x + self._positions(params["position"], coordinates).astype(x.dtype))
        x = self._layers(params, x)
        with jax.named_scope("head"):
            # Only the last time is asked for, and it depends on its own tokens alone from here.
            last = x.reshape(*x.shape[:3], config.context, -1, x.shape[-1])[:, :, :, -1]
            return _fields(_head(last, params["head"]["kernel"]), config)

    def _check(self, params: Params, fields: Array, coordinates: Array | None) -> None:
        config = self.config
        wanted = (config.context, config.in_channels, *config.grid.shape)
        if fields.shape[1:] != wanted:
            raise ValueError(
                f"fields have shape {list(fields.shape)} and must be [B, context, in_channels, "
                f"latitudes, longitudes] = [B, {', '.join(map(str, wanted))}]; constants are "
                "channels of every state"
            )
        placed = (config.context, *config.grid.shape, COORDINATES)
        if coordinates is not None and coordinates.shape != placed:
            raise ValueError(
                f"coordinates have shape {list(coordinates.shape)} and must be {list(placed)}; "
                "sphere_coordinates makes them"
            )
        if ("layers" in params) != self.execution.scan_layers:
            raise ValueError(
                f"scan_layers={self.execution.scan_layers} and parameters of the other layout do "
                "not go together; use stack_layers or unstack_layers of sqzjax.models"
            )
        mesh = dict(jax.sharding.get_abstract_mesh().shape)
        config.check_mesh(**{name: mesh.get(name, 1) for name in SPATIAL_AXES})

    def _positions(self, params: Params, coordinates: Array | None) -> Array:
        """Return what is added to the tokens, float32 `[I, J, L, E]`.

        Float32 throughout: 16-bit coordinates of a fine grid coincide, and the batch shares them.
        """
        config = self.config
        if not config.position:
            return _windows(params["table"][None], config)[0]
        if coordinates is None:
            coordinates = jnp.asarray(sphere_coordinates(config.grid, config.context))
        moved = jnp.moveaxis(coordinates, -1, 1)[None]
        return linear(_patches(moved, config, "float32"), params)[0]

    def _layers(self, params: Params, x: Array) -> Array:
        """Run pairs of blocks, one plain and one shifted; an odd block is left at the end."""
        depth = self.config.depth
        if not self.execution.scan_layers:
            layers = [params[f"layers_{index}"] for index in range(depth)]
            for start in range(0, depth, 2):
                x = self._pair(x, layers[start : start + 2])
            return x
        pairs = depth // 2

        def body(x: Array, pair: Params) -> tuple[Array, None]:
            return self._pair(x, [_layer(pair, 0), _layer(pair, 1)], scanned=True), None

        stacked = jax.tree.map(
            lambda leaf: leaf[: 2 * pairs].reshape(pairs, 2, *leaf.shape[1:]), params["layers"]
        )
        if pairs:
            x, _ = jax.lax.scan(body, x, stacked)
        if depth % 2:
            x = self._pair(x, [_layer(params["layers"], -1)])
        return x

    def _pair(self, x: Array, layers: list[Params], scanned: bool = False) -> Array:
        def run(x: Array, layers: list[Params]) -> Array:
            for index, layer in enumerate(layers):
                x = block(x, layer, self.config, shifted=index == 1)
            return x

        if self.execution.remat == "none":
            return run(x, layers)
        policy = _REMAT_POLICIES[self.execution.remat]
        # Outside a scan the compiler would share what is to be recomputed, and save nothing.
        return jax.checkpoint(run, policy=policy, prevent_cse=not scanned)(x, layers)


def sphere_coordinates(grid: Grid, context: int) -> np.ndarray:
    """Return float32 `[T, H, W, 4]`: the point on the unit sphere, and time from 0 to 1."""
    latitude = np.radians(grid.latitude())[:, None]
    longitude = np.radians(grid.longitude())[None]
    point = (
        np.cos(latitude) * np.cos(longitude),
        np.cos(latitude) * np.sin(longitude),
        np.sin(latitude) * np.ones_like(longitude),
    )
    out = np.zeros((context, *grid.shape, 4), np.float32)
    out[..., :3] = np.stack(point, axis=-1)
    out[..., 3] = np.linspace(0, 1, context)[:, None, None]
    return out


def _layer(stacked: Params, index: int) -> Params:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _patches(fields: Array, config: SwinConfig, dtype: str) -> Array:
    """Return `[B, I, J, L, C * P * P]`, the values under each token."""
    (rows, columns), (wh, ww), patch = config.windows, config.window_size, config.patch_size
    batch, times, channels = fields.shape[:3]
    split = fields.astype(dtype).reshape(
        batch, times, channels, rows, wh, patch, columns, ww, patch
    )
    ordered = split.transpose(0, 3, 6, 1, 4, 7, 2, 5, 8)
    return ordered.reshape(batch, rows, columns, config.window_length, channels * patch**2)


def _windows(x: Array, config: SwinConfig) -> Array:
    """Return tokens `[B, T, H/P, W/P, E]` grouped by window."""
    (rows, columns), (wh, ww) = config.windows, config.window_size
    split = x.reshape(*x.shape[:2], rows, wh, columns, ww, x.shape[-1])
    ordered = split.transpose(0, 2, 4, 1, 3, 5, 6)
    return ordered.reshape(x.shape[0], rows, columns, config.window_length, x.shape[-1])


def _head(x: Array, kernel: Array) -> Array:
    """Return the float32 values of the patches."""
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _fields(x: Array, config: SwinConfig) -> Array:
    """Return `[B, O, H, W]` from `[B, I, J, wh * ww, P * P * O]`."""
    (rows, columns), (wh, ww), patch = config.windows, config.window_size, config.patch_size
    split = x.reshape(x.shape[0], rows, columns, wh, ww, patch, patch, config.out_channels)
    ordered = split.transpose(0, 7, 1, 3, 5, 2, 4, 6)
    return ordered.reshape(x.shape[0], config.out_channels, *config.grid.shape)
