# SPDX-License-Identifier: Apache-2.0
"""The emulator once more, in float64 numpy: dense attention over all tokens, masked."""

import itertools
import math

import numpy as np
from scipy.special import erf

from sqzjax.models import SwinConfig


def allowed_pairs(config: SwinConfig, shifted: bool) -> np.ndarray:
    """Tell for each pair of tokens in (time, row, column) order whether they attend."""
    (rows, columns), (wh, ww) = config.patches, config.window_size
    down, right = (wh // 2, ww // 2) if shifted else (0, 0)

    def group(row: int, column: int) -> tuple:
        south = (row - down) % rows
        east = (column - right) % columns
        # Rows that came round from the north belong to no window of the south.
        over = (row < down, not config.grid.periodic and column < right)
        return south // wh, east // ww, *over

    places = itertools.product(range(config.context), range(rows), range(columns))
    groups = [group(row, column) for _, row, column in places]
    return np.array([[one == other for other in groups] for one in groups])


def forward(config: SwinConfig, params: dict, fields: np.ndarray, coordinates: np.ndarray):
    """Return `[B, O, H, W]` from unrolled parameters."""
    params = _double(params)
    patch = config.patch_size
    x = _convolve(fields, params["patch"], patch)
    if config.position:
        x = x + _convolve(coordinates.transpose(0, 3, 1, 2)[None], params["position"], patch)
    else:
        x = x + params["position"]["table"].reshape(-1, config.embed_dim)
    for index in range(config.depth):
        layer, pairs = params[f"layers_{index}"], allowed_pairs(config, index % 2 == 1)
        x = x + _attend(_norm(x, layer["attn_norm"], config), layer["attn"], config, pairs)
        hidden = _linear(_norm(x, layer["mlp_norm"], config), layer["mlp"]["up"])
        x = x + _linear(_gelu(hidden, config.gelu), layer["mlp"]["down"])
    last = x[:, -config.tokens :] @ params["head"]["kernel"]
    blocks = last.reshape(len(x), *config.patches, patch, patch, config.out_channels)
    out = np.zeros((len(x), config.out_channels, *config.grid.shape))
    for i, j in itertools.product(range(patch), range(patch)):
        out[:, :, i::patch, j::patch] = blocks[:, :, :, i, j].transpose(0, 3, 1, 2)
    return out


def _double(tree):
    if isinstance(tree, dict):
        return {name: _double(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)


def _convolve(fields, params, patch):
    """Strided convolution, one tap at a time; tokens in (time, row, column) order."""
    kernel = params["kernel"].reshape(fields.shape[2], patch, patch, -1)
    taps = itertools.product(range(patch), range(patch))
    out = sum(
        np.einsum("btchw,ce->bthwe", fields[..., i::patch, j::patch], kernel[:, i, j])
        for i, j in taps
    )
    return (out + params["bias"]).reshape(len(fields), -1, kernel.shape[-1])


def _linear(x, params):
    return x @ params["kernel"] + params["bias"]


def _norm(x, params, config):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * params["scale"]


def _gelu(x, kind):
    if kind == "erf":
        return x * 0.5 * (1 + erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _attend(x, params, config, pairs):
    heads = (*x.shape[:2], config.heads, config.head_dim)
    q, k, v = (_linear(x, params[name]).reshape(heads) for name in "qkv")
    q, k = _norm(q, params["q_norm"], config), _norm(k, params["k_norm"], config)
    scores = np.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(config.head_dim)
    weights = np.where(pairs, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    return _linear(np.einsum("bnqk,bknh->bqnh", weights, v).reshape(x.shape), params["o"])
