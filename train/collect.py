# SPDX-License-Identifier: Apache-2.0
"""Record teacher trajectories: `python -m train CONFIG` with `kind: collect` in the config.

The working directory gets `trajectories/`, the store that `data: {kind: trajectories, path: ...}`
trains on, the tokens of the documents in `data/`, `config.yaml` and `collect.log`. A trajectory
depends on its prompt, temperature and the seed alone, so the same command continues an
interrupted recording and makes damaged shards anew.
"""

import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax import config as configs
from sqzjax import sharding
from sqzjax.decode.trajectory import collect
from sqzjax.errors import ConfigError, DataError
from sqzjax.io.lock import WorkdirLock
from sqzjax.models import DecoderLM
from sqzjax.typing import Params
from train import data
from train.collect_config import CollectConfig
from train.data import trajectory_store as stores
from train.families import Language
from train.logs import log_file
from train.model_source import ModelSource, Pretrained, setting
from train.plan import readable
from train.preempt import EXIT_PREEMPTED, Preemption
from train.run import as_config_error, out_of_memory
from train.step import INIT_KEY, role_key

_log = logging.getLogger(__name__)
_WIDTH = 32  # prompts are padded to a multiple of it: one program for each


class Prompt(NamedTuple):
    """A prompt, what its document answers, and its number, which selects the random draws."""

    tokens: np.ndarray
    reference: np.ndarray
    number: int


class Shard(NamedTuple):
    """Trajectories that are saved together: all of one temperature."""

    temperature: float
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class CollectPlan:
    """What a recording needs, from shapes alone; bytes on one device where not said otherwise."""

    num_params: int
    parameter_bytes: int
    logit_bytes: int
    passes: int
    stored_bytes: int

    def describe(self) -> str:
        """Return the plan as lines of text."""
        lines = (
            ("parameters", f"{self.num_params:,}"),
            ("parameter bytes", f"{readable(self.parameter_bytes)} on one device"),
            ("logit bytes", f"{readable(self.logit_bytes)} on one device, one block of each row"),
            ("forward passes", f"{self.passes:,} per batch"),
            ("stored bytes", f"{readable(self.stored_bytes)} per trajectory"),
        )
        return "\n".join(f"{name:18}{value}" for name, value in lines)

    def out_of_memory(self) -> str:
        """Return the message of a run that does not fit, with the settings to change."""
        return (
            f"out of memory; one device needs {readable(self.parameter_bytes)} of parameters and "
            f"{readable(self.logit_bytes)} of logits; lower batch_size or max_prompt, set "
            "execution.param_dtype: bfloat16, or raise mesh.fsdp or mesh.tensor"
        )


def run(
    config: CollectConfig, *, workdir: Path, resume: str = "auto", dry_run: bool = False
) -> int:
    """Record and return the exit code: 0 done, 75 preempted with the finished shards saved.

    `resume`: "auto" goes on where the folder's recording stopped, "never" discards it; a step has
    no meaning here. `dry_run` prints the resolved configuration and what the run needs.
    """
    if resume.isdecimal():
        raise ConfigError(f"--resume {resume}: a recording has no steps; use auto or never")
    with as_config_error():
        model = DecoderLM(config.resolve_model(), config.execution)
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(config.batch_size, mesh)
        plan = make_plan(config, model, mesh)
    if dry_run:
        sys.stdout.write(f"{configs.dump(config)}\n{plan.describe()}\n")
        return 0
    workdir = Path(workdir)
    with WorkdirLock(workdir), log_file(workdir / "collect.log"), Preemption() as preemption:
        with as_config_error():
            recording = Recording(config, workdir, mesh)
        writer = recording.open(resume)
        # Not before: what a command that is refused finds in the folder stays as it was.
        (workdir / "config.yaml").write_text(configs.dump(config), encoding="utf-8")
        with jax.set_mesh(mesh), out_of_memory(plan):
            return recording.run(writer, preemption)


def make_plan(config: CollectConfig, model: DecoderLM, mesh: Any) -> CollectPlan:
    """Count what a recording needs; ValueError when the model does not fit the mesh."""
    params = model.abstract_params()
    placed = sharding.shardings(params, mesh, config.rules)
    sharding.check_unused(config.rules, params)
    sizes = jax.tree.map(
        lambda leaf, place: np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        params,
        placed,
    )
    rows = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    vocabulary = model.config.embedding_size // mesh.shape["tensor"]
    return CollectPlan(
        num_params=model.config.num_params,
        parameter_bytes=int(sum(jax.tree.leaves(sizes))),
        logit_bytes=4 * rows * config.block_size * vocabulary,
        passes=config.length,
        stored_bytes=config.length * (2 * model.config.hidden_size + 10) + 4 * config.max_prompt,
    )


class Recording:
    """The parts of one recording."""

    def __init__(self, config: CollectConfig, workdir: Path, mesh: Any):
        self.config, self.mesh = config, mesh
        self.folder = workdir / stores.FOLDER
        self.dataset = data.build(
            config.data, seed=config.seed, batch_size=1, seq_len=2, cache_dir=workdir / "data"
        )
        model_config = Language().complete(config.resolve_model(), self.dataset)
        if model_config.tokens.mask is None:
            raise ConfigError(
                "the teacher has no mask token; set "
                + setting("mask_token", "the id that it was trained with", "tokens.mask")
            )
        if self.dataset.tokenizer.eos_id is None:
            raise ConfigError("recording needs a tokenizer with an eos token; this one has none")
        self.model = DecoderLM(model_config, config.execution)
        prompts = read_prompts(self.dataset, config.max_prompt, config.count)
        # Neighbours of equal length waste no padding; training shuffles them.
        self.prompts = sorted(prompts, key=lambda prompt: len(prompt.tokens))
        self.shards = list(self._shards())

    def open(self, resume: str) -> stores.StoreWriter:
        """Return the store to fill; DataError if it holds another recording."""
        if resume == "never":
            stores.discard(self.folder)
        return stores.StoreWriter(self.folder, self.header())

    def run(self, writer: stores.StoreWriter, preemption: Preemption) -> int:
        """Write the shards that are missing; return the exit code."""
        self.dataset.tokenizer.save(self.folder / stores.TOKENIZER)
        todo, problems = writer.missing()
        for line in problems:
            _log.warning("%s; its shard is recorded again", line)
        _log.info("recording %d of %d shards in %s", len(todo), len(self.shards), self.folder)
        params = self.params() if todo else {}
        for number in todo:
            began = time.perf_counter()
            arrays = self.record(params, self.shards[number], preemption)
            if arrays is None:
                _log.warning("asked to stop: finished shards are saved, the same command continues")
                return EXIT_PREEMPTED
            writer.write(number, arrays)
            each = (time.perf_counter() - began) / len(self.shards[number].prompts)
            _log.info("shard %d of %d: %.3g s each", number + 1, len(self.shards), each)
        return 0

    def _shards(self) -> Iterator[Shard]:
        for temperature in self.config.temperatures:
            for begin in range(0, len(self.prompts), self.config.shard_size):
                chosen = self.prompts[begin : begin + self.config.shard_size]
                yield Shard(temperature, chosen)

    def header(self) -> stores.Header:
        """Return what identifies this recording."""
        config, documents = self.config, self.dataset.fingerprint
        return stores.Header(
            origin={
                "teacher": teacher_fingerprint(config.model, self.model, config.seed),
                "dtype": f"{config.execution.dtype}, {config.execution.param_dtype} parameters",
                "documents": "; ".join(
                    str(documents[name]) for name in ("files", "packing", "held_out")
                ),
                "tokenizer": str(documents["tokenizer"]),
                "temperatures": ", ".join(f"{t:g}" for t in config.temperatures),
                "max_prompt": str(config.max_prompt),
                "count": str(config.count),
                "seed": str(config.seed),
            },
            settings={
                "length": config.length,
                "block_size": config.block_size,
                "hidden_size": self.model.config.hidden_size,
                "mask_token": int(self.model.config.tokens.mask or 0),
                "prompt_width": max(len(prompt.tokens) for prompt in self.prompts),
            },
            shards=[len(shard.prompts) for shard in self.shards],
        )

    def params(self) -> Params:
        """Return the teacher's parameters, on the mesh."""
        placed = sharding.shardings(self.model.abstract_params(), self.mesh, self.config.rules)
        key = role_key(self.config.seed, INIT_KEY)
        return Language().load(self.config.model, self.model, placed, key)

    def record(
        self, params: Params, shard: Shard, preemption: Preemption | None = None
    ) -> dict[str, np.ndarray] | None:
        """Return the arrays of a shard; None if asked to stop."""
        parts = []
        for begin in range(0, len(shard.prompts), self.config.batch_size):
            if preemption is not None and preemption.requested:
                return None
            prompts = shard.prompts[begin : begin + self.config.batch_size]
            parts.append(self._record(params, prompts, shard.temperature))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _record(
        self, params: Params, prompts: Sequence[Prompt], temperature: float
    ) -> dict[str, np.ndarray]:
        config, count = self.config, len(prompts)
        # The last batch is filled up: every batch runs the same program.
        rows = [*prompts, *[prompts[-1]] * (config.batch_size - count)]
        lengths = np.array([len(prompt.tokens) for prompt in rows], np.int32)
        width = -(-int(lengths.max()) // _WIDTH) * _WIDTH
        fed = {
            "tokens": _padded([prompt.tokens for prompt in rows], width),
            "lengths": lengths,
            "rows": np.array([prompt.number for prompt in rows], np.int32),
        }
        fed = jax.device_put(fed, sharding.batch_sharding(self.mesh))
        key = jax.random.fold_in(
            jax.random.key(config.seed), config.temperatures.index(temperature)
        )
        found = collect(
            self.model,
            params,
            fed["tokens"],
            fed["lengths"],
            length=config.length,
            block_size=config.block_size,
            temperature=temperature,
            key=key,
            rows=fed["rows"],
            aligned=True,
        )
        hidden = found.hidden.astype(jnp.bfloat16)
        tokens, rank, hidden = jax.device_get((found.tokens, found.rank, hidden))
        answers = [prompt.reference[: config.length] for prompt in prompts]
        prompt_width = max(len(prompt.tokens) for prompt in self.prompts)
        return {
            "prompt": _padded([prompt.tokens for prompt in prompts], prompt_width),
            "prompt_length": lengths[:count],
            "tokens": tokens[:count],
            "rank": rank[:count],
            "hidden": hidden[:count],
            "reference": _padded(answers, config.length),
            "reference_length": np.array([len(answer) for answer in answers], np.int32),
        }


def read_prompts(dataset: data.Dataset, longest: int, count: int | None) -> list[Prompt]:
    """Return the training documents that have a prompt of at most `longest` tokens."""
    prompts: list[Prompt] = []
    documents = bare = 0
    for part in dataset.parts:
        store = part.train
        for index, skip in enumerate(store.skips):
            documents += 1
            tokens = store.document(index).astype(np.int32)
            bare += not 0 < skip < len(tokens)
            if 0 < skip <= longest and skip < len(tokens):
                prompts.append(Prompt(tokens[:skip], tokens[skip:], documents - 1))
    if not prompts:
        raise DataError(
            f"none of {documents} documents has a prompt of 1 to {longest} tokens with a response "
            f"({bare} have no prompt); use sources with prompts, such as jsonl with prompt_key and "
            "response_key, or raise max_prompt"
        )
    _log.info("%d of %d documents have a prompt that fits", len(prompts), documents)
    return prompts[:count]


def teacher_fingerprint(source: ModelSource, model: DecoderLM, seed: int) -> str:
    """Return the sha256 of the teacher's configuration and weights, wherever they lie."""
    digest = hashlib.sha256(configs.fingerprint(model.config).encode())
    if not isinstance(source, Pretrained):
        digest.update(str(seed).encode())
        return digest.hexdigest()
    for path in sorted(Path(source.path).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    out = np.zeros((len(rows), width), np.int32)
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
    return out
