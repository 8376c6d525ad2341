# SPDX-License-Identifier: Apache-2.0
"""What a Swin weather emulator is, and the shapes of its parameters. Nothing here imports jax.

The architecture of arXiv 2603.25687: one resolution, windows of latitude by longitude that every
other block shifts by half, nothing relative, no norm before the head.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sqzjax.sphere.grid import Grid

HEAD_DIM = 64
"""Width of a head where the number of heads is derived."""
COORDINATES = 4
"""Three on the unit sphere, and the time within the context in [0, 1]."""
TORCH_EPS = 2.0**-23
"""PyTorch's default of RMSNorm: the spacing of float32 at 1."""
_LARGEST_WINDOW = 9 * 4  # rows of the fields, not of patches
_MOST_HIDDEN = 1 << 24

Gelu = Literal["erf", "tanh"]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Architecture of an emulator: `context` states in, the next state out.

    `in_channels` counts prognostic and constant channels (the latter come last), `out_channels` the
    prognostic ones. `num_heads=None`: heads of 64, or one head below that width. `window=None`: the
    largest of the published rule (`window_size`), in patches. `gelu`: the exact function or the
    tanh approximation of fused kernels. `position=False` learns a table instead of embedding
    coordinates. `norm_eps` is PyTorch's default.
    """

    grid: Grid
    in_channels: int
    out_channels: int
    embed_dim: int
    depth: int
    num_heads: int | None = None
    context: int = 1
    patch_size: int = 4
    window: tuple[int, int] | None = None
    mlp_ratio: float = 4.0
    gelu: Gelu = "erf"
    position: bool = True
    norm_eps: float = TORCH_EPS

    def __post_init__(self) -> None:
        names = ("in_channels", "out_channels", "embed_dim", "depth", "context", "patch_size")
        for name in names:
            _positive(name, getattr(self, name))
        self._check_heads()
        self._check_grid()
        if not 1 <= self.mlp_ratio * self.embed_dim <= _MOST_HIDDEN:
            raise ValueError(
                f"mlp_ratio={self.mlp_ratio} times embed_dim={self.embed_dim} must lie between 1 "
                f"and {_MOST_HIDDEN}; a ratio of 4 is usual"
            )
        if self.gelu not in get_args(Gelu):
            raise ValueError(f"gelu={self.gelu!r} must be one of {get_args(Gelu)}")
        if not 0 < self.norm_eps < 1:
            raise ValueError(
                f"norm_eps={self.norm_eps} must lie between 0 and 1; 1e-5 is usual, and a row of "
                "zeros has no norm without it"
            )

    def _check_heads(self) -> None:
        if self.num_heads is None:
            if self.embed_dim > HEAD_DIM and self.embed_dim % HEAD_DIM:
                raise ValueError(
                    f"embed_dim={self.embed_dim} must be a multiple of {HEAD_DIM}, the width of a "
                    "head, where num_heads is not given; round it, or set num_heads"
                )
            return
        _positive("num_heads", self.num_heads)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide embed_dim={self.embed_dim}; use one of "
                f"{_divisors(self.embed_dim)}"
            )

    def _check_grid(self) -> None:
        for name, size in zip(("latitudes", "longitudes"), self.grid.shape):
            if size % self.patch_size:
                raise ValueError(
                    f"grid.{name}={size} must be a multiple of patch_size={self.patch_size}; use a "
                    f"patch_size of {_divisors(size)}, or leave rows out (the south pole of 721)"
                )
        if self.window is None:
            if self.patches[1] % 2:
                raise ValueError(
                    f"grid.longitudes={self.grid.longitudes} gives {self.patches[1]} patches of "
                    f"{self.patch_size} a row, an odd number, and windows are twice as wide as "
                    "high by default; set window"
                )
            return
        window: Any = self.window
        if not isinstance(window, tuple) or len(window) != 2:
            raise ValueError(
                f"window={window!r} must be two integers, rows and columns of patches; (9, 18) is "
                "published, null chooses"
            )
        for name, size, patches in zip(("rows", "columns"), self.window, self.patches):
            _positive(f"window {name}", size)
            if patches % size:
                raise ValueError(
                    f"window={self.window} must divide the {self.patches[0]} x {self.patches[1]} "
                    f"patches of the grid: {size} {name} do not; use one of {_divisors(patches)}"
                )

    def check_mesh(self, lat: int = 1, lon: int = 1) -> None:
        """Refuse a mesh whose axes `lat` and `lon` would cut through windows."""
        for name, ways, windows in zip(("lat", "lon"), (lat, lon), self.windows):
            if windows % ways:
                raise ValueError(
                    f"mesh {name}={ways} must divide the {windows} windows along it; use one of "
                    f"{_divisors(windows)}"
                )

    def check_feedback(self) -> None:
        """Refuse a model whose output is no part of its input: it cannot run on its own states."""
        if self.out_channels > self.in_channels:
            raise ValueError(
                f"out_channels={self.out_channels} must be at most in_channels={self.in_channels} "
                "of a model that runs on its own output: the input is the same channels and the "
                "constant ones after them"
            )

    @property
    def spelled_out(self) -> "SwinConfig":
        """The same architecture with the derived heads and window in place of None."""
        return replace(self, num_heads=self.heads, window=self.window_size)

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.grid.latitudes // self.patch_size, self.grid.longitudes // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches of one state."""
        return math.prod(self.patches)

    @property
    def window_size(self) -> tuple[int, int]:
        """Rows and columns of patches in a window.

        By default the largest height of 36 rows of the fields or less that divides the patches,
        and twice as many columns.
        """
        if self.window is not None:
            return self.window
        rows, columns = self.patches
        largest = math.ceil(_LARGEST_WINDOW / self.patch_size)
        fits = [h for h in range(1, largest + 1) if rows % h == 0 and columns % (2 * h) == 0]
        return fits[-1], 2 * fits[-1]

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return self.patches[0] // self.window_size[0], self.patches[1] // self.window_size[1]

    @property
    def window_length(self) -> int:
        """Tokens that attend to each other: those of a window at every time of the context."""
        return self.context * math.prod(self.window_size)

    @property
    def shift(self) -> tuple[int, int]:
        """Rows and columns by which every other block moves its windows."""
        return self.window_size[0] // 2, self.window_size[1] // 2

    @property
    def heads(self) -> int:
        """Number of heads, given or derived."""
        return self.num_heads or max(1, self.embed_dim // HEAD_DIM)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.embed_dim // self.heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the feed-forward."""
        return int(self.mlp_ratio * self.embed_dim)

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, swin_shapes(self, scan_layers=True).values()))

    @property
    def counted_params(self) -> int:
        """Number of parameters as published: linear biases left out, four norms of full width."""
        area, width = self.patch_size**2, self.embed_dim
        embeddings = (self.in_channels * area + 1) * width
        if self.position:
            embeddings += (COORDINATES * area + 1) * width
        else:
            embeddings += self.context * self.tokens * width
        block = 4 * width**2 + 2 * width * self.mlp_dim + 4 * width
        return embeddings + self.depth * block + self.out_channels * width * area


def swin_shapes(config: SwinConfig, scan_layers: bool) -> Shapes:
    """Return the shape of each parameter by path, e.g. `layers/attn/q/kernel` -> `(L, E, E)`.

    `scan_layers=False` gives the unrolled layout: `layers_0/attn/q/kernel` -> `(E, E)`. Rows of the
    patch kernel run over channel, row and column of a patch, columns of the head over row, column
    and channel.
    """
    width, area = config.embed_dim, config.patch_size**2
    shapes: Shapes = {
        "patch/kernel": (config.in_channels * area, width),
        "patch/bias": (width,),
    }
    if config.position:
        shapes |= {"position/kernel": (COORDINATES * area, width), "position/bias": (width,)}
    else:
        shapes["position/table"] = (config.context, *config.patches, width)
    block = _block_shapes(config)
    if scan_layers:
        shapes |= {f"layers/{path}": (config.depth, *shape) for path, shape in block.items()}
    else:
        for layer in range(config.depth):
            shapes |= {f"layers_{layer}/{path}": shape for path, shape in block.items()}
    return shapes | {"head/kernel": (width, area * config.out_channels)}


def _block_shapes(config: SwinConfig) -> Shapes:
    width, hidden = config.embed_dim, config.mlp_dim
    linears = {f"attn/{name}": (width, width) for name in "qkvo"}
    linears |= {"mlp/up": (width, hidden), "mlp/down": (hidden, width)}
    shapes: Shapes = {"attn_norm/scale": (width,), "mlp_norm/scale": (width,)}
    shapes |= {f"attn/{name}/scale": (config.head_dim,) for name in ("q_norm", "k_norm")}
    for path, shape in linears.items():
        shapes |= {f"{path}/kernel": shape, f"{path}/bias": shape[1:]}
    return shapes


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer >= 1")


def _divisors(value: int) -> list[int]:
    return [n for n in range(1, value + 1) if value % n == 0]
