# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint folder, and the safetensors library to look into it and to spoil it."""

import json

import numpy as np
import pytest
from jax.typing import DTypeLike

from sqzjax.io import hf
from sqzjax.io.hf_names import flatten, insert
from sqzjax.models import Execution
from sqzjax.models.config import ModelConfig
from sqzjax.models.shapes import param_shapes

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qk_norm=True,
    norm_eps=1e-6,
)


def execution(scan):
    return Execution(scan_layers=scan)


def random_params(config, scan=True, dtype: DTypeLike = np.float32):
    generator = np.random.default_rng(0)
    params = {}
    for path, shape in param_shapes(config, scan).items():
        insert(params, path, generator.standard_normal(shape).astype(dtype))
    return params


def save_small(folder):
    """Write a small checkpoint; return its folder and its parameters."""
    params = random_params(CONFIG)
    hf.save(folder, CONFIG, params)
    return folder, params


def tensors_of(folder):
    """Read every tensor with the library."""
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors_numpy.load_file(path)
    return found


def assert_same(one, other):
    """Same paths, dtypes, shapes and bits."""
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert (leaf.dtype, leaf.shape) == (other[path].dtype, other[path].shape), path
        assert np.asarray(leaf).tobytes() == np.asarray(other[path]).tobytes(), path


def tamper(folder, change):
    """Rewrite the tensors with the library after `change`."""
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    tensors = tensors_of(folder)
    change(tensors)
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
