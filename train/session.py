# SPDX-License-Identifier: Apache-2.0
"""Build everything a run consists of from its configuration: data, model, mesh, step, state."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sqzjax import sharding
from sqzjax.errors import ConfigError
from sqzjax.io.checkpoint import Checkpointer
from sqzjax.models import DecoderLM, ModelConfig, SpecialTokens, unstack_layers
from sqzjax.typing import Key, Params, PyTree
from train import data, lora, state
from train.config import TrainConfig
from train.ema import Average
from train.model_source import ModelSource, Pretrained
from train.plan import lay_out, make_plan, reference_model
from train.state import Frozen, TrainState
from train.step import INIT_KEY, LORA_KEY, REFERENCE_KEY, Program, Step, role_key

_log = logging.getLogger(__name__)


class Session:
    """The parts of one run. Cheap until `initial_state`, `restore` or `compile` is called."""

    def __init__(self, config: TrainConfig, workdir: Path):
        self.config = config
        model_config = config.resolve_model()
        self.dataset = data.open_data(
            config.data,
            seed=config.seed,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            cache_dir=workdir / "data",
        )
        self.model = DecoderLM(with_tokens(model_config, self.dataset), config.execution)
        if check_data := getattr(config.objective, "check_data", None):
            check_data(self.dataset, self.model.config)
        self.layout = lay_out(config, self.model)
        self.mesh = self.layout.mesh
        self.plan = make_plan(config, self.model, self.layout)
        self.item = "params" if config.lora is None else "lora"
        self.step = build_step(config, self.model)
        self.average = self.step.average

    # State.

    def base_params(self) -> Params:
        """Read or create the parameters that the run starts from."""
        base = self.layout.frozen.base
        abstract = self.layout.state.trained if base is None else base
        return self._params(self.config.model, self.model, abstract, INIT_KEY)

    def _params(self, source: ModelSource, model: DecoderLM, abstract: Any, role: int) -> Params:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return load_params(source, model, shardings, role_key(self.config.seed, role))

    def frozen_params(self) -> Frozen:
        """Return the parameters beside the trained ones: a LoRA base, the objective's reference."""
        base = None if self.config.lora is None else self.base_params()
        source, model = self.config.reference, self.step.reference
        if source is None or model is None:
            return Frozen(base)
        abstract = self.layout.frozen.reference
        return Frozen(base, self._params(source, model, abstract, REFERENCE_KEY))

    def initial_state(self) -> TrainState:
        """Return the state at step 0, on the mesh."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.layout.state)

        def create(trained: Params) -> TrainState:
            return state.create(trained, self.step.optimizer, self.average)

        if self.config.lora is None:
            trained = self.base_params()
        else:
            key = role_key(self.config.seed, LORA_KEY)
            trained = lora.init(self.config.lora, self.layout.frozen.base, key)
        return jax.jit(create, out_shardings=shardings, donate_argnums=0)(trained)

    def restore(
        self, checkpoints: Checkpointer, step: int | None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Return the state and `meta` of a step (None: the newest intact one); data must match."""
        wanted = state.to_items(self.layout.state, self.item)
        restored = checkpoints.restore(step, wanted)
        found = self.dataset.check_state(restored.meta["data"])
        if found != restored.step:
            raise ConfigError(f"checkpoint {restored.step} holds the data state of step {found}")
        return state.from_items(restored.items, self.item), restored.meta

    # Programs.

    def compile(self) -> Program:
        """Compile the training step for this mesh and batch shape."""
        abstract = self.layout.state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        program = Program(
            self.step.train,
            (abstract, self.layout.frozen, self.abstract_batch()),
            out_shardings=(shardings, None),
            donate=(0,),
        )
        _log.info("compiled the step; intermediate results: %s bytes", program.temporary_bytes)
        return program

    def compile_eval(self) -> Program:
        """Compile the held-out loss."""
        abstract = self.layout.state
        trained = abstract.trained if self.average is None else abstract.average
        index = jax.ShapeDtypeStruct((), np.int32)
        return Program(
            self.step.evaluate, (trained, self.layout.frozen, self.abstract_batch(), index)
        )

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes, dtypes and shardings of a batch."""
        return abstract_batch(self.dataset.columns, self.config.batch_size, self.mesh)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Place a batch on the mesh."""
        return jax.device_put(batch, sharding.batch_sharding(self.mesh))

    def export_params(self, state: TrainState, frozen: Frozen) -> Params:
        """Return the trained model's parameters: the average if there is one, LoRA merged."""
        trained = state.trained if state.average is None else state.average
        if self.config.lora is None:
            return trained
        return lora.merge(self.config.lora, frozen.base, trained)


def build_step(config: TrainConfig, model: DecoderLM) -> Step:
    """Return everything static about the training step of a run."""
    schedule, steps = config.schedule, config.steps
    return Step(
        model=model,
        objective=config.objective,
        optimizer=config.optimizer.build(),
        rate=lambda step: schedule.rate(step, steps),
        seed=config.seed,
        accumulation=config.accumulation,
        clip_norm=config.stability.clip_norm,
        lora=config.lora,
        reference=reference_model(config),
        average=None if config.ema is None else Average(config.ema),
    )


def abstract_batch(
    columns: Mapping[str, tuple[tuple[int, ...], Any]], rows: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes, dtypes and shardings of a batch of `rows` with such columns."""
    place = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)
        for name, (shape, dtype) in columns.items()
    }


def load_params(source: ModelSource, model: DecoderLM, shardings: PyTree, key: Key) -> Params:
    """Read the parameters of a checkpoint, or create fresh ones."""
    execution = model.execution
    if isinstance(source, Pretrained):
        from sqzjax.io import hf

        dtype = execution.param_dtype
        return hf.load(source.path, execution=execution, dtype=dtype, shardings=shardings)[1]

    def fresh(key: Key) -> Params:
        # Stacked, then unstacked: equal for both layouts, and fewer random arrays.
        stacked = DecoderLM(model.config, replace(execution, scan_layers=True))
        params = stacked.init_params(key)
        return params if execution.scan_layers else unstack_layers(params)

    return jax.jit(fresh, out_shardings=shardings)(key)


def with_tokens(config: ModelConfig, dataset: data.Pipeline) -> ModelConfig:
    """Check the vocabulary; take missing special tokens from the tokenizer."""
    tokenizer = dataset.tokenizer
    if dataset.vocab_size > config.vocab_size:
        raise ConfigError(
            f"model vocab_size={config.vocab_size} is smaller than the tokenizer's "
            f"{dataset.vocab_size}: ids beyond it have no embedding; use {dataset.vocab_size}"
        )
    own = config.tokens
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    tokens = SpecialTokens(
        bos=tokenizer.bos_id if own.bos is None else own.bos,
        eos=own.eos or eos,
        pad=tokenizer.pad_id if own.pad is None else own.pad,
        mask=tokenizer.mask_id if own.mask is None else own.mask,
    )
    return replace(config, tokens=tokens)
