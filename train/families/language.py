# SPDX-License-Identifier: Apache-2.0
"""Runs of language models on rows of tokens."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sqzjax import losses
from sqzjax.errors import ConfigError
from sqzjax.models import DecoderLM, ModelConfig, SpecialTokens, unstack_layers
from sqzjax.models.config import Execution
from sqzjax.sharding import batch_sharding
from sqzjax.typing import Key, Params, PyTree
from train.config import TrainConfig
from train.cost import step_flops
from train.families.base import Columns
from train.model_source import Pretrained


@dataclass(frozen=True)
class Language:
    """Decoders, tokens, Hugging Face folders."""

    unit = "tokens"

    def define(self, model_config: ModelConfig, execution: Execution) -> DecoderLM:
        """Return the decoder."""
        return DecoderLM(model_config, execution)

    def complete(self, model_config: ModelConfig, dataset: Any) -> ModelConfig:
        """Check the vocabulary; take missing special tokens from the tokenizer."""
        tokenizer = dataset.tokenizer
        if dataset.vocab_size > model_config.vocab_size:
            raise ConfigError(
                f"model vocab_size={model_config.vocab_size} is smaller than the tokenizer's "
                f"{dataset.vocab_size}: ids beyond it have no embedding; use {dataset.vocab_size}"
            )
        own = model_config.tokens
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        tokens = SpecialTokens(
            bos=tokenizer.bos_id if own.bos is None else own.bos,
            eos=own.eos or eos,
            pad=tokenizer.pad_id if own.pad is None else own.pad,
            mask=tokenizer.mask_id if own.mask is None else own.mask,
        )
        return replace(model_config, tokens=tokens)

    def columns(self, config: TrainConfig) -> Columns:
        """Return the columns of token rows, and those of trajectories.

        Responses of trajectories are taken to be as long as rows, which is the most there can be.
        """
        row = (config.seq_len,)
        integers = ["tokens", "positions", "segment_ids"]
        found: Columns = {"loss_mask": (row, np.bool_)}
        if config.data.kind == "trajectories":
            integers += ["rank", "reference"]
            teacher: Any = (config.reference or config.model).resolve()
            hidden = (config.seq_len, teacher.hidden_size)
            found |= {"prompt_length": ((), np.int32), "hidden": (hidden, jnp.bfloat16)}
        return found | dict.fromkeys(integers, (row, np.int32))

    def sharding(self, mesh: Mesh, ndim: int) -> NamedSharding:
        """Return where a column lies: rows are split, tokens are not."""
        del ndim
        return batch_sharding(mesh)

    def units_per_step(self, config: TrainConfig) -> int:
        """Return the positions of a batch."""
        return config.batch_size * config.seq_len

    def step_flops(self, config: TrainConfig, model_config: ModelConfig) -> float:
        """Return the matrix operations of a step, all passes of its objective counted."""
        return step_flops(config, model_config)

    def activation_bytes(self, config: TrainConfig, model: DecoderLM, rows: int) -> int:
        """Estimate what `rows` sequences keep for the backward pass."""
        item_bytes = jnp.dtype(model.execution.dtype).itemsize
        return activation_bytes(model.config, model.execution, rows, config.seq_len, item_bytes)

    def load(self, source: Any, model: DecoderLM, shardings: PyTree, key: Key) -> Params:
        """Read a Hugging Face folder, or create fresh parameters."""
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

    def export(self, folder: Path, model: DecoderLM, params: Params, dataset: Any) -> None:
        """Write the model and its tokenizer as a Hugging Face folder."""
        from sqzjax.io import hf

        with tempfile.TemporaryDirectory() as temporary:
            dataset.tokenizer.save(temporary)
            files = sorted(Path(temporary).iterdir())
            hf.save(folder, model.config, params, tokenizer_files=files, overwrite=True)


def activation_bytes(
    model: ModelConfig, execution: Execution, rows: int, seq_len: int, item_bytes: int
) -> int:
    """Estimate what is kept for the backward pass of `rows` sequences."""
    queries = model.num_heads * model.head_dim
    keys = model.num_kv_heads * model.head_dim
    linear = 2 * queries + 4 * keys + 2 * model.hidden_size + 3 * model.intermediate_size
    scores = 2 * 4 * model.num_heads * seq_len  # float32 scores and probabilities
    layer = item_bytes * (linear + 4 * model.hidden_size) + scores
    kept = {
        "none": layer,
        "dots": item_bytes * (linear + model.hidden_size),
        "full": item_bytes * model.hidden_size,
    }[execution.remat]
    chunk = max(losses.CHUNK_LOGITS, losses.CHUNK_ROWS * model.embedding_size)
    logits = 3 * 4 * min(chunk, rows * seq_len * model.embedding_size)
    return rows * seq_len * (kept * model.num_layers + layer) + logits
