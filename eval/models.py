# SPDX-License-Identifier: Apache-2.0
"""Load a model under evaluation: a Hugging Face folder or the working folder of a training run.

Of a run, the newest checkpoint whose checksums hold is taken, or the exported folder. Everything a
task needs hangs off `LoadedModel`: tokenizer, scorer, generator, and a fingerprint by which saved
samples are recognised.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from eval.config import Likelihood, ModelEntry
from eval.diffusion_scoring import DiffusionScorer
from eval.scoring import LikelihoodScorer, Scorer
from eval.usage import Usage
from eval.weights import trained_params
from sqzjax import config as configs
from sqzjax import kvcache
from sqzjax.decode import DiffusionConfig, Generator, SamplingConfig
from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io import checkpoint, hf
from sqzjax.io import tokenizer as tokenizers
from sqzjax.io.tokenizer import Tokenizer
from sqzjax.kvcache import Dense
from sqzjax.models import DecoderLM, Execution, ModelConfig, fit_cache, unstack_layers
from sqzjax.typing import Params


@dataclass(frozen=True)
class Found:
    """Where a model's weights lie and what shape they have; nothing is loaded yet."""

    config: ModelConfig
    folder: Path  # with safetensors, or one checkpoint step
    is_checkpoint: bool
    workdir: Path | None  # of the training run
    tokenizer: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    reference: "Found | None" = None  # of a decoder that needs one

    @property
    def adapter_only(self) -> bool:
        """Whether a checkpoint holds a LoRA adapter without the model beneath."""
        return self.is_checkpoint and self.meta.get("config", {}).get("lora") is not None

    @property
    def source(self) -> str:
        """Say in words what is loaded."""
        if self.is_checkpoint:
            return f"checkpoint at step {self.folder.name} of {self.workdir}"
        return f"exported model of {self.workdir}" if self.workdir else f"folder {self.folder}"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to answer; `settings` say how requests are batched."""

    name: str
    model: DecoderLM
    params: Params = field(repr=False)
    tokenizer: Tokenizer
    cache: kvcache.KVCache | None
    found: Found
    fingerprint: str
    batch_size: int
    max_length: int
    prefill_chunk: int
    decoder: DiffusionConfig | None = None
    reference: tuple[DecoderLM, Params] | None = field(default=None, repr=False)
    likelihood: Likelihood = Likelihood()

    def scorer(
        self, *, max_length: int = 0, truncate: Literal["never", "left"] = "never"
    ) -> LikelihoodScorer:
        """Return a scorer: through the cache setting, or bounds if the model is not causal."""
        settings: dict[str, Any] = {
            "model": self.model,
            "params": self.params,
            "batch_size": self.batch_size,
            "max_length": max_length or self.limit,
            "truncate": truncate,
        }
        if self.model.config.mask != "causal":
            return DiffusionScorer(likelihood=self.likelihood, **settings)
        return Scorer(cache=self.cache, prefill_chunk=self.prefill_chunk, **settings)

    @property
    def limit(self) -> int:
        """Most tokens that are fed to the model at once."""
        return min(self.max_length or 2**31, self.model.config.max_positions)

    @cached_property
    def _generator(self) -> Generator:
        cache = self.cache or kvcache.Dense()
        model, params = self.reference or (None, None)
        decoder = None if self.decoder is None else self.decoder.build(self.model, cache, model)
        return Generator(
            self.model,
            self.params if model is None else {"model": self.params, "reference": params},
            cache=cache,
            tokenizer=self.tokenizer,
            capacity=self.max_length or None,
            batch_size=self.batch_size,
            prefill_chunk=self.prefill_chunk,
            decoder=decoder,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig],
        *,
        row_ids: Sequence[int],
        truncate: Literal["never", "left"] = "never",
        usage: Usage | None = None,
    ) -> list[str]:
        """Return the continuations as text, `batch_size` prompts at a time.

        What they cost is added to `usage`.
        """
        texts: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            began = time.perf_counter()
            out = self._generator.generate(
                [list(prompt) for prompt in prompts[part]],
                sampling if isinstance(sampling, SamplingConfig) else sampling[part],
                row_ids=row_ids[part],
                truncate="left" if truncate == "left" else None,
            )
            if usage is not None:
                usage.add(out, time.perf_counter() - began)
            texts += out.text or ()
        return texts

    def describe(self) -> dict[str, Any]:
        """Return what a result must say about the model it belongs to."""
        config = self.model.config
        return {
            "name": self.name,
            "source": self.found.source,
            "family": config.family,
            "parameters": config.num_params,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "max_length": self.limit,
            "dtype": self.model.execution.dtype,
            "cache": None if self.cache is None else configs.to_dict(self.cache),
            "decoder": None if self.decoder is None else configs.to_dict(self.decoder),
            "reference": None if self.found.reference is None else self.found.reference.source,
            "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)),
            "tokenizer": self.tokenizer.fingerprint[:16],
            "fingerprint": self.fingerprint,
        }


def load(
    entry: ModelEntry,
    found: Found | None = None,
    *,
    batch_size: int = 8,
    max_length: int = 0,
    prefill_chunk: int = 128,
) -> LoadedModel:
    """Load weights, in the layout and dtype that decode fastest, and the tokenizer.

    `found` is what `locate` returned, if it was asked. The numbers mean what they mean in
    `EvalConfig`.
    """
    found = found or locate(entry)
    cache, decoder, other = cache_policy(entry), decoder_config(entry), found.reference
    execution = Execution(dtype=entry.dtype, param_dtype=entry.dtype, scan_layers=False)
    params = _params(found, execution)
    tokenizer = tokenizers.load(found.tokenizer)
    if tokenizer.vocab_size > found.config.embedding_size:
        raise ConfigError(
            f"tokenizer {found.tokenizer} has {tokenizer.vocab_size} ids, model {entry.name!r} "
            f"embeds {found.config.embedding_size}; they do not belong together"
        )
    model = DecoderLM(found.config, execution)
    return LoadedModel(
        name=entry.name,
        model=model,
        params=params if cache is None else fit_cache(model, params, cache),
        tokenizer=tokenizer,
        cache=cache,
        found=found,
        fingerprint=_fingerprint(entry, found, tokenizer, (max_length, prefill_chunk)),
        batch_size=batch_size,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        decoder=decoder,
        reference=other and (DecoderLM(other.config, execution), _params(other, execution)),
        likelihood=entry.likelihood,
    )


def decoder_config(entry: ModelEntry) -> DiffusionConfig | None:
    """Return the decoding method that an entry names; ConfigError lists what is wrong with it."""
    if entry.decoder is None:
        return None
    try:
        return configs.load(DiffusionConfig, entry.decoder)
    except ConfigError as error:
        raise ConfigError(f"decoder of model {entry.name!r}: {p}" for p in error.problems) from None


def locate(entry: ModelEntry) -> Found:
    """Find what an entry names; loads nothing. ConfigError if settings do not suit the model."""
    found = find(entry)
    if entry.reference:
        name = f"{entry.name}'s reference"
        there = ModelEntry(path=entry.reference, name=name, tokenizer=entry.tokenizer or "bytes")
        found = replace(found, reference=find(there))
    check_decoder(entry, found)
    return found


def check_decoder(entry: ModelEntry, found: Found) -> None:
    """Raise ConfigError if the decoding method of an entry does not go with its model."""
    decoder, other = decoder_config(entry), found.reference
    if other is not None and decoder is None:
        raise ConfigError(
            f"reference={entry.reference!r} of model {entry.name!r} is of no use without a decoder"
        )
    try:
        if decoder is not None:
            model = DecoderLM(found.config, Execution())
            reference = other and DecoderLM(other.config, Execution())
            decoder.build(model, cache_policy(entry) or Dense(), reference)
    except ValueError as error:
        raise ConfigError(f"decoder of model {entry.name!r}: {error}") from None


def cache_policy(entry: ModelEntry) -> kvcache.KVCache | None:
    """Return the cache policy that an entry names; ConfigError lists what is wrong with it."""
    if entry.cache is None:
        return None
    try:
        return configs.load(kvcache.CacheConfig, entry.cache)
    except ConfigError as error:
        raise ConfigError(f"cache of model {entry.name!r}: {p}" for p in error.problems) from None


def find(entry: ModelEntry) -> Found:
    """Locate weights and tokenizer and read the model's shape; loads nothing."""
    path = Path(entry.path)
    if (path / "config.json").is_file():
        return Found(hf.read_config(path), path, False, None, entry.tokenizer or str(path))
    steps, export = path / "checkpoints", path / "export"
    if entry.weights != "export" and steps.is_dir():
        found = _find_checkpoint(entry, path)
        if not found.adapter_only:
            return found
        if entry.weights == "checkpoint":
            raise CheckpointError(
                f"model {entry.name!r}: {found.source} holds a LoRA adapter alone; train with "
                "export: true and use weights: export"
            )
    if entry.weights != "checkpoint" and (export / "config.json").is_file():
        return Found(hf.read_config(export), export, False, path, entry.tokenizer or str(export))
    raise CheckpointError(
        f"model {entry.name!r}: no weights at {path} (weights={entry.weights}); it must be a "
        "Hugging Face folder with a config.json, or a training run's folder with checkpoints/ or "
        "export/"
    )


def _find_checkpoint(entry: ModelEntry, workdir: Path) -> Found:
    checkpoints = checkpoint.Checkpointer(workdir / "checkpoints")
    step = checkpoints.latest_good() if entry.step is None else entry.step
    if step is None or step not in checkpoints.steps():
        wanted = "complete step" if step is None else f"step {step}"
        raise CheckpointError(
            f"model {entry.name!r}: {workdir / 'checkpoints'} holds no {wanted}; it has "
            f"{checkpoints.steps()}"
        )
    folder = workdir / "checkpoints" / str(step)
    meta = checkpoint.read_meta(folder)
    if not isinstance(meta.get("model"), Mapping):
        raise CheckpointError(f"{folder} does not say what its model is; evaluate an export")
    config = configs.load(ModelConfig, meta["model"])
    return Found(
        config, folder, True, workdir, entry.tokenizer or _run_tokenizer(workdir, meta), meta
    )


def _run_tokenizer(workdir: Path, meta: Mapping[str, Any]) -> str:
    """Return where the tokenizer lies that the checkpoint was trained with."""
    wanted = meta.get("data", {}).get("fingerprint", {}).get("tokenizer")
    named = meta.get("config", {}).get("data", {}).get("tokenizer", {}).get("path")
    trained = sorted((workdir / "data").glob("bpe-*/tokenizer.json"))
    for place in (workdir / "export" / "tokenizer.json", *trained, named, "bytes"):
        there = place and (place == "bytes" or Path(place).exists())
        if there and tokenizers.load(place).fingerprint == wanted:
            return str(place)
    raise CheckpointError(
        f"the tokenizer that {workdir} was trained with was found neither there nor in its "
        "configuration; name it with the model's key tokenizer"
    )


def _params(found: Found, execution: Execution) -> Params:
    """Read parameters, of a step their average if it has one, unrolled, in the running dtype."""
    dtype = jnp.dtype(execution.param_dtype)
    if not found.is_checkpoint:
        return hf.load(found.folder, execution=execution, dtype=dtype)[1]
    return trained_params(
        found.folder,
        averaged=found.meta.get("config", {}).get("ema") is not None,
        expected=DecoderLM(found.config, execution).abstract_params(),
        convert=lambda params: jax.tree.map(
            lambda leaf: leaf.astype(dtype), unstack_layers(params)
        ),
    )


def _fingerprint(entry: ModelEntry, found: Found, tokenizer: Tokenizer, limits: Any) -> str:
    """Hash what determines a model's output: files by size and time, shape, cache, limits."""
    folders = [x.folder for x in (found, found.reference) if x is not None]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    # Names and likelihoods do not matter to generated text.
    plain = replace(entry, name="-", likelihood=Likelihood())
    shape, settings = configs.to_dict(found.config), configs.to_dict(plain)
    del settings["likelihood"]
    parts = [stamps, shape, settings, tokenizer.fingerprint, limits]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]
