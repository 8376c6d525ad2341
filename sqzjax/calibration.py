# SPDX-License-Identifier: Apache-2.0
"""Calibrate KVQuant: ranges of keys and codebooks weighted by the loss's curvature.

    calibration = calibrate(model, params, samples, CalibrationSettings())
    save("kvquant.safetensors", calibration)

Three passes over the samples, one at a time in float32: the extent of each key channel, its
histogram, from which the ranges to try come, and the squared gradients of keys and values (the
diagonal Fisher), from which each layer's weighted histograms of scaled numbers come. One backward
pass serves all layers. Memory does not grow with the number of samples: it is that of one sample's
keys, values and gradients, and `range_bins` counts for each key channel. Time is that of about four
forward passes. The k-means at the end is exact.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax import losses
from sqzjax.artefact import Artefact
from sqzjax.attention import rope
from sqzjax.calibration_config import FORMAT, CalibrationSettings
from sqzjax.errors import CheckpointError, DataError
from sqzjax.io.safetensors import SafetensorsFile, TensorSpec, write
from sqzjax.models import DecoderLM, fingerprint, unstack_layers
from sqzjax.models.layers import PROBES, WATCHED
from sqzjax.quant import Codebook
from sqzjax.quant.kmeans import Histogram, kmeans, matching, objective
from sqzjax.quant.quantiles import count, grow, quantile
from sqzjax.quant.sensitivity import scaled_keys, scaled_values
from sqzjax.quant.uniform import TINY
from sqzjax.typing import Array, Params, PyTree

Sample = Mapping[str, np.ndarray]
"""One row `[1, T]`: `tokens`, optionally `positions`, `segment_ids` and `loss_mask` as well."""
PASSES = ("extent", "counts", "codes")
SHARES = (1.0, 1 / 4, 1 / 16, 0.0)
"""Of the outliers, how many may lie beyond the range of a channel; the first is the paper's."""
STATE = ("extent", "counts", "ranges", "key_sums", "clipped", "value_sums", "tokens")


class NonFiniteError(ValueError):
    """Activations, gradients or the loss of a sample are infinite or NaN."""


class Calibrator:
    """A calibration under way. `state` and `restore` let it stop and go on, bit for bit."""

    def __init__(self, model: DecoderLM, params: Params, settings: CalibrationSettings):
        if model.config.mask != "causal":
            raise ValueError(
                f"mask={model.config.mask!r}: the calibration needs the next-token loss of a "
                "causal model"
            )
        self.settings, self.config = settings, model.config
        self.fingerprint = fingerprint(model, params)
        execution = replace(model.execution, scan_layers=False, dtype="float32")
        self.model = DecoderLM(model.config, execution)
        self.params = unstack_layers(params)
        layers = model.config.num_layers
        channels = model.config.num_kv_heads * model.config.head_dim
        self.number, self.done = 0, 0  # of the pass, of its samples
        self.extent = np.full((layers, 2, channels), np.inf, np.float32)
        self.extent[:, 1] = -np.inf
        self.counts = np.zeros((0,), np.uint32)  # L C bins during its pass
        tried = len(settings.outliers), len(SHARES)
        self.ranges = np.zeros((*tried, 2, layers, channels), np.float32)
        self.key_sums = np.zeros((*tried, layers, 3, settings.bins))
        self.clipped = np.zeros((*tried, layers, 2, 3))  # of what lies beyond and has no slot
        self.value_sums = np.zeros((len(settings.outliers), layers, 3, settings.bins))
        self.tokens = np.zeros(2, np.int64)  # that count, and those of them that predict another
        self.losses: list[float] = []

    @property
    def finished(self) -> bool:
        """Whether all passes are done."""
        return self.number == len(PASSES)

    def observe(self, sample: Sample) -> None:
        """Add a sample to the current pass; every pass must see the same ones.

        Its arrays are of one row, `[1, T]`. A sample without a token that counts changes nothing,
        and is not looked at.
        """
        shape = np.shape(sample["tokens"])
        if len(shape) != 2 or shape[0] != 1:
            raise ValueError(
                f"a sample's tokens are of shape {list(shape)} and must be [1, T]; give each row "
                "as a sample of its own"
            )
        name, mask = PASSES[self.number], _counted(sample, self.settings.sinks)
        if not mask.any():
            self.done += 1
            return
        if name == "extent":
            predicting = np.asarray(_targets(dict(sample))[1])[0] > 0
            self.tokens += mask.sum(), (mask & predicting).sum()
        found = _forward(self.model, self.settings.rope, self.params, dict(sample), name == "codes")
        loss, kept = jax.device_get((found[0], _finite(found)))
        if not np.isfinite(loss) or not kept.all():
            layer = "" if kept.all() else f" in layer {int(np.argmin(kept))}"
            raise NonFiniteError(
                f"sample {self.done}: loss {loss}; activations or gradients are not finite{layer}; "
                "check the weights, or leave the sample out"
            )
        for layer, (k, v, *gradients) in enumerate(found[1]):
            if name == "codes":
                self._add_codes(layer, (k, v), gradients, mask)
            else:
                self._add_keys(layer, np.asarray(k)[mask])
        self.done += 1
        if name == "codes":
            self.losses.append(float(loss))

    def advance(self) -> None:
        """End the current pass."""
        if PASSES[self.number] == "extent":
            self._check_tokens()
            shape = (*self.extent.shape[::2], self.settings.range_bins)
            self.counts = np.zeros(shape, np.uint32)
        elif PASSES[self.number] == "counts":
            self._set_ranges()
            self.counts = np.zeros((0,), np.uint32)
        self.number, self.done = self.number + 1, 0

    def _check_tokens(self) -> None:
        """Raise DataError unless some tokens count, and as the weights need it, predict others."""
        count, predicting = self.tokens
        if count and (predicting or self.settings.weighting == "none"):
            return
        raise DataError(
            f"of {self.done} samples {count} tokens count, {predicting} of them with a successor "
            f"in the loss, but at least one must; padding and the first sinks={self.settings.sinks}"
            " tokens of a document do not count, nor do masked successors: give more or longer "
            "samples, lower sinks, or mask less"
        )

    def _add_keys(self, layer: int, keys: np.ndarray) -> None:
        keys = keys.reshape(len(keys), -1)
        if PASSES[self.number] == "extent":
            self.extent[layer] = grow(self.extent[layer], keys)
        else:
            count(self.counts[layer], self.extent[layer], keys)

    def _tried(self) -> list[tuple[int, int, float, float]]:
        """Return (place of the fraction, of the share, fraction, share) of each range to try."""
        return [
            (i, j, fraction, share)
            for i, fraction in enumerate(self.settings.outliers)
            for j, share in enumerate(SHARES)
            if j == 0 or (fraction and self.settings.ranges == "fitted")
        ]

    def _set_ranges(self) -> None:
        """Set scale and offset of each key channel, for each range to try."""
        for i, j, fraction, share in self._tried():
            beyond = fraction * share / 2
            for layer, extent in enumerate(self.extent):
                counts: Any = self.counts[layer]
                low, high = (quantile(counts, extent, t) for t in (beyond, 1 - beyond))
                self.ranges[i, j, :, layer] = np.maximum((high - low) / 2, TINY), (high + low) / 2

    def _add_codes(self, layer: int, tensors: PyTree, gradients: PyTree, mask: np.ndarray) -> None:
        weighting, bins, shape = self.settings.weighting, self.settings.bins, _heads(self.config)
        for i, j, fraction, _ in self._tried():
            slots = Codebook(outliers=fraction).slots(shape[-1])
            ranges = self.ranges[i, j, :, layer].reshape(2, *shape)
            x, gradient = tensors[0], gradients[0]
            found = scaled_keys(weighting, slots, ranges, x, gradient, mask)
            u, weight, clipped = jax.device_get(found)
            Histogram(bins, self.key_sums[i, j, layer]).add(u, weight)
            self.clipped[i, j, layer] += clipped
            if j == 0:
                found = scaled_values(weighting, slots, tensors[1], gradients[1], mask)
                Histogram(bins, self.value_sums[i, layer]).add(*jax.device_get(found))

    def finish(self) -> Artefact:
        """Return for every bits and outliers the codebooks, and the ranges of keys."""
        settings, arrays = self.settings, {}
        layers, shape = range(self.config.num_layers), _heads(self.config)
        for i, fraction in enumerate(settings.outliers):
            for bits in settings.bits:
                end = f"{bits}.{fraction:g}"
                best = [self._best_range(i, layer, bits) for layer in layers]
                for place, name in enumerate(("scale", "offset")):
                    chosen = [self.ranges[i, j, place, layer] for layer, (j, *_) in enumerate(best)]
                    arrays[f"k.{name}.{end}"] = np.reshape(chosen, (len(best), *shape))
                values = [Histogram(settings.bins, self.value_sums[i, layer]) for layer in layers]
                fitted = {
                    "k": [(histogram, table) for _, histogram, table in best],
                    "v": [
                        (histogram, kmeans(*histogram.points(), 2**bits)) for histogram in values
                    ],
                }
                for tensor, each in fitted.items():
                    tables, norms = [table for _, table in each], [matching(*one) for one in each]
                    arrays[f"{tensor}.table.{end}"] = np.asarray(tables, np.float32)
                    arrays[f"{tensor}.q_norm.{end}"] = np.asarray(norms, np.float32)
        return Artefact(arrays, self._metadata())

    def _best_range(
        self, fraction: int, layer: int, bits: int
    ) -> tuple[int, Histogram, np.ndarray]:
        """Return which range of a layer's keys has the least weighted error, and its codebook."""
        found = []
        for j in (j for i, j, *_ in self._tried() if i == fraction):
            histogram = Histogram(self.settings.bins, self.key_sums[fraction, j, layer])
            table = kmeans(*histogram.points(), 2**bits)
            weight, first, second = self.clipped[fraction, j, layer].T
            ends = table[[0, -1]]  # what clipped numbers are decoded as
            clipped = np.sum(second - 2 * ends * first + ends**2 * weight)
            found.append((objective(*histogram.points(), table) + clipped, j, histogram, table))
        return min(found, key=lambda one: one[0])[1:]

    def _metadata(self) -> dict[str, str]:
        settings = self.settings
        return {
            "kind": "kvquant",
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "bits": ",".join(map(str, settings.bits)),
            "outliers": ",".join(f"{fraction:g}" for fraction in settings.outliers),
            "sinks": str(settings.sinks),
            "rope": settings.rope,
            "weighting": settings.weighting,
            "ranges": settings.ranges,
            "samples": str(len(self.losses)),
            "loss": f"{np.mean(self.losses):.6g}" if self.losses else "",
        }

    def state(self) -> Artefact:
        """Return everything that `restore` needs to go on."""
        arrays = {name: getattr(self, name) for name in STATE}
        arrays["losses"] = np.array(self.losses, np.float64)
        return Artefact(
            arrays, {**self._identity(), "pass": str(self.number), "done": str(self.done)}
        )

    def _identity(self) -> dict[str, str]:
        settings = json.dumps(asdict(self.settings), sort_keys=True)
        return {"fingerprint": self.fingerprint, "settings": settings}

    def restore(self, state: Artefact) -> None:
        """Go on from a state; ValueError if it belongs to another model or other settings."""
        arrays, metadata = state
        for name, value in self._identity().items():
            if metadata.get(name) != value:
                raise ValueError(
                    f"the calibration under way has {name} {metadata.get(name)}, this one {value}; "
                    "restore the old setting or start anew with --resume never"
                )
        self.number, self.done = int(metadata["pass"]), int(metadata["done"])
        for name in STATE:
            setattr(self, name, np.array(arrays[name]))
        self.losses = [float(loss) for loss in arrays["losses"]]


def calibrate(
    model: DecoderLM,
    params: Params,
    samples: Sequence[Sample],
    settings: CalibrationSettings = CalibrationSettings(),
) -> Artefact:
    """Return the calibration of a model on some samples, 16 of 2,048 tokens in the paper."""
    calibrator = Calibrator(model, params, settings)
    run(calibrator, samples.__getitem__, len(samples))
    return calibrator.finish()


def run(
    calibrator: Calibrator,
    sample: Callable[[int], Sample],
    samples: int,
    after: Callable[[], bool] = lambda: True,
) -> bool:
    """Make the passes that are left; False if `after`, called after each sample, said to stop."""
    while not calibrator.finished:
        while calibrator.done < samples:
            calibrator.observe(sample(calibrator.done))
            if not after():
                return False
        calibrator.advance()
    return True


def save(path: str | Path, artefact: Artefact) -> None:
    """Write an artefact, or a state, as one safetensors file, atomically."""
    specs = [
        TensorSpec(name, array.dtype, array.shape, lambda array=array: array)
        for name, array in artefact.arrays.items()
    ]
    write(path, specs, artefact.metadata)


def load(path: str | Path) -> Artefact:
    """Read what `save` has written."""
    file = SafetensorsFile(path)
    try:
        return Artefact({name: file.read(name) for name in file.tensors}, file.metadata)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}") from None


# One sample on the device ---------------------------------------------------------------------


def _heads(config: Any) -> tuple[int, int]:
    return config.num_kv_heads, config.head_dim


@partial(jax.jit, static_argnums=(0, 1, 4))
def _forward(model: DecoderLM, place: str, params: Params, sample: dict, backward: bool) -> PyTree:
    """Return the loss and per layer keys, values and, if asked, their gradients, `[T, K, H]`."""
    config = model.config
    shape = (*sample["tokens"].shape, *_heads(config))
    zeros = {"keys": jnp.zeros(shape), "values": jnp.zeros(shape)}
    names = [f"layers_{index}" for index in range(config.num_layers)]
    probes = {name: {"attn": zeros} for name in names}

    def loss(probes: PyTree) -> tuple[Array, PyTree]:
        variables = {"params": params, PROBES: probes}
        rest: PyTree = {name: sample.get(name) for name in ("positions", "segment_ids")}
        out, seen = model.apply(
            variables,
            sample["tokens"],
            **rest,
            logits="none",
            return_hidden="last",
            mutable=[WATCHED],
        )
        tied = config.tie_embeddings
        targets, weights = _targets(sample)
        table = losses.head_table(params, tied)
        found = losses.cross_entropy(out.hidden, table, targets, weights, tied=tied)  # type: ignore[union-attr]
        return found.sum / jnp.maximum(found.weight, 1), seen[WATCHED]

    if backward:
        (value, seen), slopes = jax.value_and_grad(loss, has_aux=True)(probes)
        trees = (seen, slopes)
    else:
        value, seen = loss(probes)
        trees = (seen,)
    turn = partial(_turn, config, sample) if place == "post" else lambda x: x
    layers = []
    for name in names:
        pairs = [tree[name]["attn"] for tree in trees]
        layers.append(tuple(x[0] for pair in pairs for x in (turn(pair["keys"]), pair["values"])))
    return value, layers


def _turn(config: Any, sample: dict, x: Array) -> Array:
    """Rotate keys, or their gradients: a rotation takes both along."""
    positions = sample.get("positions")
    if positions is None:
        positions = jnp.arange(x.shape[1])[None]
    return rope.rotate(x, *rope.angles(config.rope, config.head_dim, jnp.maximum(positions, 0)))


def _targets(sample: dict) -> tuple[Array, Array]:
    """Return each token's successor and whether it counts: within the document, not masked."""
    tokens = sample["tokens"]
    follows = jnp.ones(tokens.shape, bool).at[:, -1].set(False)
    if (segments := sample.get("segment_ids")) is not None:
        follows &= (segments >= 0) & (jnp.roll(segments, -1, axis=1) == segments)
    if (counted := sample.get("loss_mask")) is not None:
        follows &= jnp.roll(counted, -1, axis=1)
    return jnp.roll(tokens, -1, axis=1), follows.astype(jnp.float32)


@jax.jit
def _finite(found: PyTree) -> Array:
    """Return whether everything of each layer is finite."""
    return jnp.stack(
        [jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in layer])) for layer in found[1]]
    )


def _counted(sample: Sample, sinks: int) -> np.ndarray:
    """Return which tokens count, `[T]`: no padding, no first tokens of a document."""
    length = sample["tokens"].shape[1]
    positions = np.asarray(sample.get("positions", np.arange(length)[None]))[0]
    counted = positions >= sinks
    if (segments := sample.get("segment_ids")) is not None:
        counted &= np.asarray(segments)[0] >= 0
    return counted
