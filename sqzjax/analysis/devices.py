# SPDX-License-Identifier: Apache-2.0
"""Peak figures of accelerators, for roofline predictions.

Figures are dense (no structured sparsity), per chip, from vendor data sheets; `source` says which.
Where vendors state several memory clocks, the slower shipping part is listed. A CPU has no data
sheet worth using: measure it (`eval.machine`) and build a `Hardware` from the result.
"""

import re
from dataclasses import dataclass

from sqzjax.analysis.numbers import Number


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device: rates in bytes/s and operations/s (a multiply-add is two operations).

    `peak_flops` is the matrix peak at the compute dtype (16 bit on accelerators, float32 on a CPU);
    `peak_int8` applies when weights, activations and KV all have <= 8 bits. Zero means unknown:
    no int8 speed-up, no ceiling for `peak_vector`, no limit for `on_chip_bytes` and
    `memory_bytes`. `link_bandwidth` is per direction and used by tensor parallelism only.
    """

    name: str
    bandwidth: Number
    peak_flops: Number
    peak_int8: Number = 0.0
    peak_vector: Number = 0.0
    on_chip_bytes: Number = 0.0
    memory_bytes: Number = 0.0
    link_bandwidth: Number = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("bandwidth", "peak_flops"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} of {self.name!r} must be > 0; "
                    "give bytes/s and operations/s from a data sheet or a measurement"
                )

    @property
    def ridge(self) -> Number:
        """Operations per byte at which the matrix peak, not memory, becomes the limit."""
        return self.peak_flops / self.bandwidth


_LLM_VIEWER = "hahnyuan/LLM-Viewer hardware_params.py"
_SCALING_BOOK = "one-way ICI bytes/s of a link: How To Scale Your Model"

V100 = Hardware(
    name="V100",
    bandwidth=900e9,
    peak_flops=112e12,
    peak_int8=62e12,
    peak_vector=15.7e12,
    on_chip_bytes=20.48e6,
    memory_bytes=16e9,
    link_bandwidth=150e9,
    source=_LLM_VIEWER + "; FP32 and NVLink: V100 data sheet",
)
A6000 = Hardware(
    name="A6000",
    bandwidth=768e9,
    peak_flops=154.84e12,
    peak_int8=309.7e12,
    peak_vector=38.7e12,
    on_chip_bytes=21.504e6,
    memory_bytes=48e9,
    link_bandwidth=56.25e9,
    source=_LLM_VIEWER + "; FP32 and NVLink bridge: RTX A6000 data sheet",
)
A100_40GB = Hardware(
    name="A100 40GB",
    bandwidth=1555e9,
    peak_flops=312e12,
    peak_int8=624e12,
    peak_vector=19.5e12,
    on_chip_bytes=27.648e6,
    memory_bytes=40e9,
    link_bandwidth=300e9,
    source=_LLM_VIEWER + "; FP32 and NVLink: A100 data sheet",
)
A100_80GB = Hardware(
    name="A100 80GB",
    bandwidth=2039e9,
    peak_flops=312e12,
    peak_int8=624e12,
    peak_vector=19.5e12,
    on_chip_bytes=27.648e6,
    memory_bytes=80e9,
    link_bandwidth=300e9,
    source=_LLM_VIEWER + "; FP32 and NVLink: A100 data sheet",
)
L40 = Hardware(
    name="L40",
    bandwidth=864e9,
    peak_flops=181e12,
    peak_int8=362e12,
    peak_vector=90.5e12,
    on_chip_bytes=36.4e6,
    memory_bytes=48e9,
    link_bandwidth=32e9,
    source=_LLM_VIEWER + "; FP32 and PCIe gen 4: L40 data sheet",
)
H100_PCIE = Hardware(
    name="H100 PCIe",
    bandwidth=2048e9,
    peak_flops=756.5e12,
    peak_int8=1513e12,
    peak_vector=51e12,
    on_chip_bytes=29.2e6,
    memory_bytes=80e9,
    link_bandwidth=64e9,
    source=_LLM_VIEWER + "; FP32 and PCIe gen 5: H100 data sheet",
)
H100_SXM = Hardware(
    name="H100 SXM",
    bandwidth=3.35e12,  # LLM-Viewer has 3072e9, an early figure; the data sheet states 3.35 TB/s
    peak_flops=989.5e12,
    peak_int8=1979e12,
    peak_vector=67e12,
    on_chip_bytes=33.8e6,
    memory_bytes=80e9,
    link_bandwidth=450e9,
    source="H100 data sheet; on-chip bytes: " + _LLM_VIEWER,
)
H200 = Hardware(
    name="H200",
    bandwidth=4.8e12,
    peak_flops=989e12,
    peak_int8=1979e12,
    peak_vector=67e12,
    on_chip_bytes=33.8e6,
    memory_bytes=141e9,
    link_bandwidth=450e9,
    source="H200 data sheet; same GPU die as H100 SXM",
)
# On-chip bytes of TPUs are VMEM per chip. Vendors publish no vector peak, so it is left out.
TPU_V4 = Hardware(
    name="TPU v4",
    bandwidth=1.2e12,
    peak_flops=275e12,
    on_chip_bytes=32 * 2**20,
    memory_bytes=32 * 2**30,
    link_bandwidth=45e9,
    source=_SCALING_BOOK + "; Google Cloud TPU v4 documentation",
)
TPU_V5E = Hardware(
    name="TPU v5e",
    bandwidth=819e9,
    peak_flops=197e12,
    peak_int8=394e12,
    on_chip_bytes=128 * 2**20,
    memory_bytes=16 * 2**30,
    link_bandwidth=45e9,
    source=_SCALING_BOOK + "; Google Cloud TPU v5e documentation",
)
TPU_V5P = Hardware(
    name="TPU v5p",
    bandwidth=2.765e12,
    peak_flops=459e12,
    peak_int8=918e12,
    on_chip_bytes=128 * 2**20,
    memory_bytes=95 * 2**30,
    link_bandwidth=90e9,
    source=_SCALING_BOOK + "; Google Cloud TPU v5p documentation",
)
TPU_V6E = Hardware(
    name="TPU v6e",
    bandwidth=1.64e12,
    peak_flops=918e12,
    peak_int8=1836e12,
    on_chip_bytes=128 * 2**20,
    memory_bytes=32 * 2**30,
    link_bandwidth=90e9,
    source=_SCALING_BOOK + "; Google Cloud TPU v6e documentation",
)

DEVICES = {
    device.name: device
    for device in (
        V100,
        A6000,
        A100_40GB,
        A100_80GB,
        L40,
        H100_PCIE,
        H100_SXM,
        H200,
        TPU_V4,
        TPU_V5E,
        TPU_V5P,
        TPU_V6E,
    )
}

# The first matching pattern wins; word boundaries keep GH200 and L40S (other parts) out.
_PATTERNS: tuple[tuple[str, Hardware], ...] = (
    (r"\bh200\b", H200),
    (r"\bh100\b.*pcie", H100_PCIE),
    (r"\bh100\b.*(hbm3|sxm)", H100_SXM),
    (r"\ba100\b.*80gb", A100_80GB),
    (r"\ba100\b.*40gb", A100_40GB),
    (r"\brtx a6000\b", A6000),
    (r"\bl40\b", L40),
    (r"\bv100\b", V100),
    (r"\btpu v4$", TPU_V4),
    (r"\btpu v5( lite|e)\b", TPU_V5E),
    (r"\btpu v5p?$", TPU_V5P),
    (r"\btpu v6( lite|e)\b", TPU_V6E),
)


def hardware_for(device_kind: str) -> Hardware:
    """Return the record of a `jax.devices()[0].device_kind` string, or of a name in `DEVICES`."""
    if device_kind in DEVICES:
        return DEVICES[device_kind]
    for pattern, device in _PATTERNS:
        if re.search(pattern, device_kind.lower()):
            return device
    raise ValueError(
        f"device_kind={device_kind!r} has no hardware record; use one of {sorted(DEVICES)}, or "
        "build Hardware(...) from a data sheet (on a CPU: from a measurement)"
    )
