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

    def __post_init__(self) -> None:
        self.quantizers  # noqa: B018  (checks bits and outliers)

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
        end = f"{self.bits}.{self.outliers:g}"
        shape = (layer.num_kv_heads, 1, layer.head_dim)
        fitted: PyTree = {
            "k": {
                name: arrays[f"k.{name}.{end}"][layer.index].reshape(shape)
                for name in ("scale", "offset")
            },
            "v": {},
        }
        for name, fields in fitted.items():
            table = arrays[f"{name}.table.{end}"][layer.index][None]
            fields["table"] = table
            if self.q_norm:
                alpha, beta = arrays[f"{name}.q_norm.{end}"][layer.index]
                fields["levels"] = alpha * table + beta
        return fitted

    def _check(self, metadata: dict[str, str], layer: LayerWeights) -> None:
        """Raise ValueError naming what the calibration lacks, and how to make it anew."""
        again = f"make one with `{COMMAND}`"
        if metadata.get("kind") != "kvquant":
            raise ValueError(f"calibration={self.calibration!r} is not one of kvquant; {again}")
        if metadata.get("format") != FORMAT:
            raise ValueError(f"calibration={self.calibration!r} has an older layout; {again}")
        if metadata["fingerprint"] != layer.fingerprint:
            raise ValueError(
                f"calibration={self.calibration!r} belongs to the model {metadata['fingerprint']}, "
                f"this is {layer.fingerprint}; {again}"
            )
        for name, held in (("bits", "bits"), ("outliers", "outliers"), ("rope", "rope")):
            value = getattr(self, name)
            text = value if isinstance(value, str) else f"{value:g}"
            if text not in metadata[held].split(","):
                raise ValueError(
                    f"{name}={text} is not in calibration={self.calibration!r}, which holds "
                    f"{metadata[held]}; use one of these or add it to {held} and {again}"
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
