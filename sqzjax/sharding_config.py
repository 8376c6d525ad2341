# SPDX-License-Identifier: Apache-2.0
"""Mesh sizes and sharding rules as data; nothing here imports jax."""

from dataclasses import dataclass

AXES = ("data", "fsdp", "tensor")
"""Mesh axes, slowest links first: neighbours on `tensor` talk most and lie side by side."""

BATCH_AXES = ("data", "fsdp")
"""Mesh axes that split the batch."""

SPATIAL_AXES = ("lat", "lon")
"""Mesh axes that split latitudes and longitudes of gridded fields, where a mesh has them."""

Rule = tuple[str, tuple[str | None, ...]]
"""A regex searched in a `/`-joined path, and mesh axes (or None) for the trailing dimensions."""

_COLUMN = r"(^|/)(q|k|v|gate|up)/"
_ROW = r"(^|/)(o|down)/"

DEFAULT_RULES: tuple[Rule, ...] = (
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"head/kernel$", ("fsdp", "tensor")),
    (_COLUMN + "kernel$", ("fsdp", "tensor")),
    (_COLUMN + "bias$", ("tensor",)),
    (_ROW + "kernel$", ("tensor", "fsdp")),
    (_ROW + "bias$", ()),
    (r"norm/scale$", ()),
    # Adapters `a [in, r]`, `b [r, out]` are split like the kernel beside them; r is small.
    (_COLUMN + "a$", ("fsdp", None)),
    (_COLUMN + "b$", (None, "tensor")),
    (_ROW + "a$", ("tensor", None)),
    (_ROW + "b$", (None, "fsdp")),
    # Embeddings of the patches and coordinates of gridded fields.
    (r"(^|/)(patch|position)/kernel$", (None, "fsdp")),
    (r"(^|/)(patch|position)/(bias|table)$", ()),
    # What a cache was fitted with (`sqzjax.models.fit_cache`): tables and factors of a layer.
    (r"attn/cache/", ()),
)
"""Megatron's column- and row-parallel split over `tensor`, the other dimension over `fsdp`."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per axis; one of them may be -1: whatever the others leave.

    `data` replicates parameters, `fsdp` splits parameters and batch, `tensor` splits heads,
    feed-forward and vocabulary. `lat` and `lon` split gridded fields and the tokens on them; they
    are axes of the mesh only where they exceed 1.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    lat: int = 1
    lon: int = 1

    def __post_init__(self) -> None:
        for name in SPATIAL_AXES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and size != -1:
                raise ValueError(f"{name}={size} must be >= 1, or -1 for the remaining devices")
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            raise ValueError(
                f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}: only one axis may "
                "be -1; give the others a size"
            )

    def axes(self, num_devices: int) -> dict[str, int]:
        """Return all axes of the mesh in order, with their sizes."""
        data, fsdp, tensor = self.sizes(num_devices)
        spatial = {"lat": self.lat, "lon": self.lon} if self.lat * self.lon > 1 else {}
        return {"data": data, "fsdp": fsdp, **spatial, "tensor": tensor}

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """Return the sizes of `AXES` on `num_devices` devices; ValueError when they do not fit."""
        asked = (self.data, self.fsdp, self.tensor)
        fixed = self.lat * self.lon
        for size in asked:
            fixed *= max(size, 1)
        if fixed > num_devices or (-1 in asked and num_devices % fixed):
            divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
            raise ValueError(
                f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}"
                f"{self._spatial_text()} needs a multiple of {fixed} devices and {num_devices} are "
                f"present; use sizes whose product is one of {divisors}"
            )
        data, fsdp, tensor = (num_devices // fixed if size == -1 else size for size in asked)
        return data, fsdp, tensor

    def _spatial_text(self) -> str:
        return f", lat={self.lat}, lon={self.lon}" if self.lat * self.lon > 1 else ""


def check_rules(rules: tuple[Rule, ...]) -> None:
    """Raise ValueError for a rule with an unknown mesh axis or one axis used twice."""
    for pattern, spec in rules:
        named = [axis for axis in spec if axis is not None]
        if unknown := [axis for axis in named if axis not in AXES]:
            raise ValueError(f"rule {pattern!r} names mesh axis {unknown[0]!r}; use one of {AXES}")
        if len(set(named)) < len(named):
            raise ValueError(
                f"rule {pattern!r} uses a mesh axis twice in {spec}; it can split one dimension"
            )
