# SPDX-License-Identifier: Apache-2.0
"""KVQuant: 2 to 4 bits per number by calibrated codebooks (arXiv 2401.18079).

Keys are coded before rotation with fixed scales per channel, values with scales found per token;
both into a table of the layer that minimises the loss's second-order error, with slots for the
outliers of each vector and the first token exact. Pick it when the context is long, every token
must stay retrievable, and one calibration of the model is acceptable. At 128 channels 3 bits with
1 % outliers are 4.8 times smaller than bfloat16, and 2 bits 6.9 times.

Unlike the paper's, outliers and value scales belong to a (token, kv head) instead of a token of the
whole layer: about 1 % of the numbers either way, but nothing crosses heads. Outliers that find no
slot are clipped, which the calibration weighs when it chooses the ranges of keys (`ranges` of
`CalibrationSettings`). Slots always hold the residual of the elements chosen, also where these lie
within the range. Keys of models with QK-norm are coded after the norm. Scales of keys are float32:
they cost nothing per token.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from sqzjax import artefact
from sqzjax.calibration_config import FORMAT
from sqzjax.kvcache.base import AttentionSpec, LayerWeights
from sqzjax.kvcache.quantized import KeyValueCache
from sqzjax.quant import Codebook, Quantizer
from sqzjax.typing import PyTree

COMMAND = (
    "python -m train configs/train/calibrate.yaml model.path=MODEL data.tokenizer.path=MODEL "
    "--workdir runs/calibration"
)
"""Makes the calibration of a model in a folder MODEL."""
_AGAIN = f"make one with `{COMMAND}`"
_METADATA = ("fingerprint", "bits", "outliers", "rope")


@dataclass(frozen=True, kw_only=True)
class KVQuant(KeyValueCache):
    """`bits` per number, a fraction of `outliers` and `sinks` first tokens exact.

    `calibration` is the file that a `kind: calibrate` run has written for this model; it must hold
    `bits` and `outliers`. `q_norm` matches mean and deviation of the decoded numbers to those of
    the calibration, for 2 bits without sinks. Average bits at head width H with E slots:
    bits + 24 E / H for keys, 32 / H more for values.
    """

    kind: Literal["kvquant"] = "kvquant"
    bits: int = 3
    outliers: float = 0.01
    sinks: int = 1
    rope: Literal["pre", "post"] = "pre"
    residual_length: int = 0
    q_norm: bool = False
    calibration: str = ""

    @property
    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        return (
            Codebook(bits=self.bits, axis="channel", outliers=self.outliers),
            Codebook(bits=self.bits, axis="token", outliers=self.outliers),
        )

    def fit(self, layer: LayerWeights) -> PyTree:
        if not self.calibration:
            raise ValueError(
                "calibration='' but cache kind='kvquant' needs a calibration of the model; make it "
                f"with `{COMMAND}` and set calibration=runs/calibration/kvquant.safetensors"
            )
        arrays, metadata = artefact.read(self.calibration)
        self._check(metadata, layer)

        def array(name: str, *shape: int) -> np.ndarray:
            return self._array(arrays, name, (layer.num_layers, *shape))[layer.index]

        channels = (layer.num_kv_heads, layer.head_dim)
        ranges = {name: array(f"k.{name}", *channels)[:, None] for name in ("scale", "offset")}
        if np.any(ranges["scale"] <= 0):
            raise ValueError(
                f"calibration={self.calibration!r} is damaged: scales of layer {layer.index} are "
                f"not positive; {_AGAIN}"
            )
        fitted: PyTree = {"k": ranges, "v": {}}
        for name, fields in fitted.items():
            table = array(f"{name}.table", 2**self.bits)[None]
            fields["table"] = table
            if self.q_norm:
                alpha, beta = array(f"{name}.q_norm", 2)
                fields["levels"] = alpha * table + beta
        return fitted

    def _array(
        self, arrays: dict[str, np.ndarray], name: str, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Return an array of a calibration that holds these bits and outliers by its metadata."""
        name = f"{name}.{self.bits}.{self.outliers:g}"
        if name not in arrays or arrays[name].shape != shape:
            found = f"of shape {list(arrays[name].shape)}" if name in arrays else "missing"
            raise ValueError(
                f"calibration={self.calibration!r} is damaged: {name} is {found}, not of shape "
                f"{list(shape)}; {_AGAIN}"
            )
        return arrays[name]

    def _check(self, metadata: dict[str, str], layer: LayerWeights) -> None:
        """Raise ValueError naming what the calibration lacks, and how to make it anew."""
        if metadata.get("kind") != "kvquant":
            raise ValueError(f"calibration={self.calibration!r} is not one of kvquant; {_AGAIN}")
        if metadata.get("format") != FORMAT:
            raise ValueError(f"calibration={self.calibration!r} has an older layout; {_AGAIN}")
        lacking = [name for name in _METADATA if name not in metadata]
        if lacking:
            raise ValueError(
                f"calibration={self.calibration!r} is damaged: it does not name its "
                f"{', '.join(lacking)}; {_AGAIN}"
            )
        if metadata["fingerprint"] != layer.fingerprint:
            raise ValueError(
                f"calibration={self.calibration!r} belongs to the model {metadata['fingerprint']}, "
                f"this is {layer.fingerprint}; {_AGAIN}"
            )
        for name, held in (("bits", "bits"), ("outliers", "outliers"), ("rope", "rope")):
            value = getattr(self, name)
            text = value if isinstance(value, str) else f"{value:g}"
            if text not in metadata[held].split(","):
                raise ValueError(
                    f"{name}={text} is not in calibration={self.calibration!r}, which holds "
                    f"{metadata[held]}; use one of these or add it to {held} and {_AGAIN}"
                )

    def fitted_form(self, spec: AttentionSpec) -> PyTree:
        table = jnp.zeros((1, 2**self.bits))
        channels = jnp.ones((spec.num_kv_heads, 1, spec.head_dim))
        return {"k": {"table": table, "scale": channels, "offset": channels}, "v": {"table": table}}

    def encode(self, kept: PyTree, fitted: PyTree) -> PyTree:
        return super().encode(kept, _given(fitted))

    def complete(self, codes: PyTree, fitted: PyTree) -> PyTree:
        return super().complete(codes, _given(fitted))


def _given(fitted: PyTree) -> PyTree:
    if fitted is None:
        raise ValueError(
            "the parameters hold no calibration for cache kind='kvquant'; pass them through "
            "sqzjax.models.fit_cache(model, params, policy) first"
        )
    return fitted
